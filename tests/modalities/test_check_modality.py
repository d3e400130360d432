"""The check for a user's own modality: what is broken is caught by the law that is meant, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from mmdiff.augmentation import Change
from mmdiff.modalities import MODALITIES, Condition, Dense, FillsAnchor, Label, Modality, Shape
from mmdiff.modalities.contract import LAWS, Finding, check_modality
from mmdiff.slots import Axis, ModalitySlots, slots

SHAPE = Shape((1, 8, 8), 6, 10)


class Depth(Dense):
    """Nothing wrong with it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, channels=1, size=8, mean=4.0, std=2.0)


class OtherType(Depth):
    def placeholder(self) -> Tensor:
        return super().placeholder().long()


class WrongShape(Depth):
    def encode(self, value: Tensor) -> Tensor:
        return super().encode(value)[..., :4]


class Loud(Depth):
    def _to_space(self, standardised: Tensor) -> Tensor:
        return 3 * super()._to_space(standardised)


class MixedEncoding(Depth):
    def encode(self, value: Tensor) -> Tensor:
        return super().encode(value - value.mean(dim=0) + self.mean)


class Undeclared(Depth):
    def observe(self, value: Tensor) -> Tensor:
        return super().observe(value).repeat(1, 2, 1, 1)


class Drifting(Depth):
    def follow(self, value: Tensor, change: Change) -> Tensor:
        return super().follow(value, change).roll(int(change.flip), -2)


class Unreduced(Depth):
    def nll(self, params: Tensor, value: Tensor) -> Tensor:
        return super().nll(params, value).mean()


class MixedLikelihood(Depth):
    def nll(self, params: Tensor, value: Tensor) -> Tensor:
        nll = super().nll(params, value)
        return nll - nll.mean()


class Infinite(Depth):
    def nll(self, params: Tensor, value: Tensor) -> Tensor:
        return super().nll(params, value) / 0


class Deaf(Depth):
    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        return self.mode(params)


class OwnNoise(Depth):
    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        return super().sample(params, torch.randn_like(noise))


class MixedDraws(Depth):
    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        return super().sample(params, noise - noise.mean(dim=0))


class WrongMode(Depth):
    def mode(self, params: Tensor) -> Tensor:
        return super().mode(params) + self.std


class EncodingOfTheMode(Label):
    """Right for a Gaussian, wrong for classes: the mean of encodings is not that of the likeliest class."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, num_classes=5)

    def expected_encoding(self, params: Tensor) -> Tensor:
        return self.encode(self.mode(params))


class SignalInOtherUnits(Depth):
    def expected_signal(self, params: Tensor) -> Tensor:
        return self.mean + self.std * super().expected_signal(params)


class Idle(Depth):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.spare = nn.Parameter(torch.zeros(3))


class Coarse(Depth):
    def postprocess(self, value: Tensor) -> list[Any]:
        return super().postprocess(value.round())


class Rounding(Depth):
    def save(self, shown: Any, stem: Path) -> Path:
        return super().save(shown.round(), stem)


class Shuffled(Depth):
    """Its random order of rows is in no state dict: a loaded model would encode otherwise."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.register_buffer("order", torch.randperm(8), persistent=False)

    def _to_space(self, standardised: Tensor) -> Tensor:
        return super()._to_space(standardised)[:, :, self.order]


class Narrow(Depth):
    """Its weight is not widened, so that what it encodes is of half precision too."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.gain = nn.Parameter(torch.ones(1, 1, 1, 1))

    def encode(self, value: Tensor) -> Tensor:
        return super().encode(value).to(self.gain.dtype) * self.gain


class Raising(Depth):
    def decode(self, features: Tensor, pooled: Tensor) -> Tensor:
        return {"mean": features}["log_std"]


class Summing(Depth):
    def average(self, params: list[Tensor]) -> Tensor:
        return sum(params[1:], params[0])


class Unnamed(Depth):
    def slots(self, by_name: bool) -> ModalitySlots:
        return super().slots(by_name)._replace(channels=[])


class Twins(Depth):
    def slots(self, by_name: bool) -> ModalitySlots:
        return super().slots(by_name)._replace(state={"head.mean.conv.weight": {1: Axis(slots([0] * 6))}})


class Tied(Depth):
    """Nothing wrong with it: its state holds the head once."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.twin = self.head


class Overlapping(Depth):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.register_buffer("part", self.head.mean.conv.weight.data[:1])


class Unpicklable(Depth):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.unit = lambda value: value


BROKEN = {
    OtherType: ("values", "examples are torch.float32, the placeholder torch.int64"),
    WrongShape: ("encoding", "encode(value) gives shape (64, 1, 8, 4), expected (64, 1, 8, 8)"),
    Loud: ("unit variance", "the mean square of encode(examples) is 9"),
    MixedEncoding: ("encoding", "encode depends on the other rows of the batch"),
    Undeclared: ("observation", "observe(value) gives shape (64, 2, 8, 8), expected (64, 1, 8, 8)"),
    Drifting: ("following", "follow gives another value after two flips"),
    Unreduced: ("likelihood", "nll(params, value) gives shape (), expected (64,)"),
    MixedLikelihood: ("likelihood", "nll depends on the other rows of the batch"),
    Infinite: ("likelihood", "nll(params, value) gives NaN or infinity"),
    Deaf: ("sampling", "sample does not depend on the noise"),
    OwnNoise: ("sampling", "sample differs between two calls: use only the noise"),
    MixedDraws: ("sampling", "sample depends on the other rows of the batch"),
    WrongMode: ("mode", "a draw is likelier than the mode, by "),
    EncodingOfTheMode: ("expected encoding", "expected_encoding is "),
    SignalInOtherUnits: ("expected signal", "expected_signal is "),
    Summing: ("average", "average([params, params]) has another nll than params"),
    Idle: ("gradients", "no finite gradient reaches the parameter spare"),
    Coarse: ("round trip", "preprocess(postprocess(value)) differs from the value by up to 0."),
    Rounding: ("files", "parse reads another value than save has written"),
    Shuffled: ("save and load", "encode differs after loading the state dict into a fresh instance"),
    Narrow: ("half precision", "encode gives torch.bfloat16, expected torch.float32"),
    Overlapping: ("safetensors", "{'head.mean.conv.weight', 'part'} share memory"),
    Unnamed: ("slots", "observation_channels has 1 entries, slots 0 different ones"),
    Twins: ("slots", "head.mean.conv.weight, dimension 1, has 6 entries, slots 1 different ones"),
    Unpicklable: ("copies", "raises "),
    Raising: ("likelihood", "raises KeyError: 'log_std' (test_check_modality.py:"),
}


def faults(kind: type[Condition]) -> dict[str, str]:
    return {law: fault for law, fault in check_modality(kind, SHAPE) if fault is not None}


def test_nothing_is_wrong_with_what_they_derive_from() -> None:
    assert faults(Depth) == faults(Tied) == {}
    assert check_modality(lambda shape: Label(shape, num_classes=5), SHAPE) == [Finding(law, None) for law in LAWS]


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_modality_is_caught_by_the_law_that_is_meant(kind: type[Modality]) -> None:
    law, text = BROKEN[kind]
    found = faults(kind)
    assert next(iter(found)) == law  # what comes before it is in order
    assert found[law].startswith(text)
    assert "\n" not in found[law]


def test_every_law_catches_something() -> None:
    assert {law for law, _ in BROKEN.values()} == set(LAWS)


def test_one_that_cannot_be_built_is_a_finding_and_no_crash() -> None:
    found = check_modality(lambda shape: Dense(shape, channels=0, size=8), SHAPE)
    assert [finding.law for finding in found] == list(LAWS)
    assert all("raises InputError: channels = 0: needs at least one (dense.py:" in str(f.fault) for f in found)


def test_the_check_leaves_the_random_state_as_it_was() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_modality(OwnNoise, SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


class Flag(Condition):
    """As little as a condition needs: a sign, in every pixel."""

    value_shape = (1,)

    def preprocess(self, raw: Any) -> Tensor:
        return torch.from_numpy(raw)

    def examples(self, count: int, generator: Generator) -> Tensor:
        return torch.randint(2, (count, 1), generator=generator) * 2.0 - 1

    def encode(self, value: Tensor) -> Tensor:
        return value[:, :, None, None].expand(-1, *self.shape.space)


class Number(Flag, Modality):
    """As little as a head needs: a number with a Gaussian."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.head = nn.Linear(shape.pooled, 1)

    def decode(self, features: Tensor, pooled: Tensor) -> Tensor:
        return self.head(pooled)

    def nll(self, params: Tensor, value: Tensor) -> Tensor:
        return 0.5 * (value - params).square()[:, 0]

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        return params + noise

    def mode(self, params: Tensor) -> Tensor:
        return params


@pytest.mark.parametrize("kind", [Flag, Number])
def test_the_abstract_members_are_all_that_a_type_of_ones_own_needs(kind: type[Condition]) -> None:
    assert faults(kind) == {}


HEAD = Modality.__abstractmethods__ - Condition.__abstractmethods__


@pytest.mark.parametrize("kind", MODALITIES.values())
def test_a_modality_has_the_members_of_its_contracts_and_no_others(kind: type[Condition]) -> None:
    assert len(HEAD) == 4 and len(Condition.__abstractmethods__) == 4
    assert {name for name in HEAD if hasattr(kind, name)} == (HEAD if issubclass(kind, Modality) else set())
    filling = FillsAnchor.__abstractmethods__ - Modality.__abstractmethods__
    assert {name for name in filling if hasattr(kind, name)} == (filling if issubclass(kind, FillsAnchor) else set())
