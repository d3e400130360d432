"""The contract of a modality: one set of laws for all. A new modality adds one entry to CASES."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Generator, Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal

from mmdiff.errors import InputError
from mmdiff.modalities import MODALITIES, Image, Label, Modality, Shape

FEATURES, POOLED = 6, 10
LEVELS = 256
UNIFORM_RMS = math.sqrt((LEVELS + 1) / (LEVELS - 1) / 3)  # of the uniform law on 256 even points in [−1, 1]


def images(channels: int) -> Callable[[int, Generator], Tensor]:
    def draw(count: int, generator: Generator) -> Tensor:
        return torch.randint(LEVELS, (count, channels, 8, 8), generator=generator) / 127.5 - 1.0

    return draw


def labels(count: int, generator: Generator) -> Tensor:
    return torch.randint(5, (count,), generator=generator)


def pictures(*shape: int) -> list[PILImage.Image]:
    pixels = np.random.default_rng(0).integers(LEVELS, size=(3, *shape), dtype=np.uint8)
    return [PILImage.fromarray(array) for array in pixels]


def image_law(params: Tensor) -> Distribution:
    return Independent(Normal(params[:, :-1], params[:, -1:].exp()), 3)


def saved(raw: PILImage.Image, folder: Path) -> str:
    raw.save(folder / "raw.png")
    return str(folder / "raw.png")


@dataclass(frozen=True)
class Case:
    name: str
    space: tuple[int, int, int]
    build: Callable[[Shape], Modality]
    values: Callable[[int, Generator], Tensor]  # random values, as the data would have them
    raws: list[Any]  # valid raw values
    feature: Any  # of a data set's column that holds the raws
    law: Callable[[Tensor], Distribution]  # p(x | params) by torch
    text: Callable[[Any, Path], str]  # what a person types for a raw value
    same: Callable[[Any, Any], bool] = operator.eq


def _image(channels: int) -> Callable[[Shape], Modality]:
    return lambda shape: Image(shape, channels=channels, size=8, scale=1 / UNIFORM_RMS)


def _label(shape: Shape) -> Modality:
    return Label(shape, num_classes=5)


def _coarse_label(shape: Shape) -> Modality:
    return Label(shape, num_classes=5, table_size=2)


def _text(raw: Any, folder: Path) -> str:
    return str(raw)


IDS = datasets.Value("int64")
NAMES = datasets.ClassLabel(names=list("abcde"))
CASES = [
    Case("image", (1, 8, 8), _image(1), images(1), pictures(8, 8), datasets.Image(), image_law, saved),
    Case("colour", (3, 8, 8), _image(3), images(3), pictures(8, 8, 3), datasets.Image(), image_law, saved),
    Case("label", (2, 8, 8), _label, labels, [4, 0, 3], NAMES, lambda p: Categorical(logits=p), _text),
    Case("coarse", (2, 8, 8), _coarse_label, labels, [4, 0, 3], NAMES, lambda p: Categorical(logits=p), _text),
    Case("integers", (2, 8, 8), _label, labels, [4, 0, 3], IDS, lambda p: Categorical(logits=p), _text),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def build(case: Case, seed: int = 0) -> Modality:
    torch.manual_seed(seed)
    return case.build(Shape(case.space, FEATURES, POOLED))


def decoded(modality: Modality, count: int = 6) -> Tensor:
    generator = seeded(1)
    features = 2 * torch.randn(count, FEATURES, *modality.shape.space[1:], generator=generator)
    return modality.decode(features, 2 * torch.randn(count, POOLED, generator=generator))


def draws(modality: Modality, params: Tensor, count: int) -> Tensor:
    """``count`` draws of the law of one row of params."""
    noise = torch.randn(count, *modality.noise_shape, generator=seeded(2))
    return modality.sample(params.expand(count, *params.shape[1:]), noise)


def test_every_kind_is_tested() -> None:
    assert {type(build(case)) for case in CASES} == set(MODALITIES.values())


# --------------------------------------------------------------------------------------------- value -> diffusion


@every_case
def test_encodings_have_mean_square_one(case: Case) -> None:
    modality, values = build(case), case.values(2000, seeded())
    encoding = modality.encode(values)
    assert encoding.shape == (2000, *case.space)
    assert encoding.isfinite().all()
    squares = encoding.detach().double().square().mean(dim=(1, 2, 3))  # (B,), independent
    error = 4 * float(squares.std()) / math.sqrt(len(squares))
    assert float(squares.mean()) == pytest.approx(1.0, abs=error + 1e-5)  # 1e-5: float32


@every_case
def test_observation_has_its_declared_channels(case: Case) -> None:
    modality = build(case)
    observation = modality.observe(case.values(3, seeded()))
    assert observation.shape == (3, modality.observation_channels, *case.space[1:])
    assert observation.isfinite().all()


@every_case
def test_encoding_and_observation_are_per_sample(case: Case) -> None:
    modality, values = build(case), case.values(6, seeded())
    for map_ in (modality.encode, modality.observe):
        torch.testing.assert_close(torch.cat([map_(part) for part in values.split(4)]), map_(values), rtol=0, atol=0)


@every_case
def test_gradients_reach_every_parameter(case: Case) -> None:
    modality, values = build(case), case.values(64, seeded())  # 64 rows meet all 5 classes
    encoding = modality.encode(values)
    weights = torch.randn(encoding.shape, generator=seeded(3))
    loss = (weights * encoding).sum() + modality.nll(decoded(modality, 64), values).sum()
    loss.backward()
    for name, parameter in modality.named_parameters():
        assert parameter.grad is not None, name
        rows = parameter.grad.reshape(len(parameter), -1)
        assert rows.any(dim=1).all(), name  # of every class, of every output


# --------------------------------------------------------------------------------------------- diffusion -> value


@every_case
def test_nll_is_that_of_the_law_per_dimension(case: Case) -> None:
    modality, values = build(case).double(), case.values(6, seeded())
    values = values.double() if values.is_floating_point() else values
    params = decoded(modality.float()).double()
    nll = modality.nll(params, values)
    assert nll.shape == (6,)
    torch.testing.assert_close(nll * modality.dimensions, -case.law(params).log_prob(values), rtol=1e-10, atol=1e-10)


@every_case
def test_nll_is_per_sample(case: Case) -> None:
    modality, values = build(case), case.values(6, seeded())
    params = decoded(modality)
    whole = modality.nll(params, values)
    parts = [modality.nll(p, v) for p, v in zip(params.split(4), values.split(4), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(modality.nll(params.flip(0), values.flip(0)).flip(0), whole, rtol=1e-6, atol=1e-6)


@every_case
def test_sample_is_a_function_of_params_and_noise_per_sample(case: Case) -> None:
    modality = build(case)
    params, noise = decoded(modality), torch.randn(6, *modality.noise_shape, generator=seeded(2))
    whole = modality.sample(params, noise)
    modality.check(whole)
    parts = [modality.sample(p, n) for p, n in zip(params.split(4), noise.split(4), strict=True)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(modality.sample(params, -noise), whole)


@every_case
def test_samples_follow_the_law(case: Case) -> None:
    """E[nll] over draws is the law's entropy."""
    modality = build(case)
    params = decoded(modality, 1).detach()
    nll = modality.nll(params.expand(4000, *params.shape[1:]), draws(modality, params, 4000)).double()
    error = 4 * float(nll.std()) / math.sqrt(len(nll))
    assert float(nll.mean()) == pytest.approx(float(case.law(params).entropy()) / modality.dimensions, abs=error)


@every_case
def test_nothing_is_likelier_than_the_mode(case: Case) -> None:
    modality = build(case)
    for params in decoded(modality).split(1):
        mode = modality.mode(params)
        modality.check(mode)
        rows = params.expand(500, *params.shape[1:])
        assert (modality.nll(rows, draws(modality, params, 500)) >= modality.nll(params, mode) - 1e-6).all()


@every_case
def test_expected_encoding_is_the_mean_over_draws(case: Case) -> None:
    modality, count = build(case), 4000
    with torch.no_grad():
        for params in decoded(modality, 2).split(1):
            encodings = modality.encode(draws(modality, params, count)).double()
            expected = modality.expected_encoding(params)
            assert expected.shape == (1, *case.space)
            error = encodings.std(dim=0) / math.sqrt(count)
            # 5 standard errors: about 200 numbers are compared, each off with probability 6e-7
            assert ((encodings.mean(dim=0) - expected[0]).abs() <= 5 * error + 1e-5).all()


# ------------------------------------------------------------------------------------------------- data <-> value


@every_case
def test_preprocess_gives_valid_values(case: Case) -> None:
    modality = build(case)
    for raw in case.raws:
        value = modality.preprocess(raw)
        assert value.shape == modality.value_shape == modality.placeholder().shape
        assert value.dtype == modality.placeholder().dtype
        modality.check(value[None])


@every_case
def test_postprocess_undoes_preprocess(case: Case) -> None:
    modality = build(case)
    back = modality.postprocess(torch.stack([modality.preprocess(raw) for raw in case.raws]))
    assert len(back) == len(case.raws)
    assert all(case.same(one, other) for one, other in zip(back, case.raws, strict=True))


@every_case
def test_parse_reads_what_a_person_types(case: Case, tmp_path: Path) -> None:
    modality = build(case)
    for raw in case.raws:
        parsed = modality.parse(case.text(raw, tmp_path))
        assert torch.equal(modality.preprocess(parsed), modality.preprocess(raw))
    with pytest.raises(InputError, match="no such thing"):
        modality.parse("no such thing")


@every_case
def test_settings_from_data_fit_the_data(case: Case) -> None:
    features = datasets.Features({"column": case.feature})
    rows = datasets.Dataset.from_dict({"column": [None, *case.raws]}, features=features)
    kind = type(build(case))
    settings = kind.settings_from_data(rows.features["column"], (row["column"] for row in rows))
    modality = kind(Shape(case.space, FEATURES, POOLED), **settings)
    assert modality.value_shape == build(case).value_shape
    for row, raw in zip(rows.select(range(1, len(rows))), case.raws, strict=True):
        assert torch.equal(modality.preprocess(row["column"]), build(case).preprocess(raw))


@every_case
def test_placeholder_and_gallery_are_valid(case: Case) -> None:
    modality = build(case)
    gallery = modality.gallery()
    for values in [modality.placeholder()[None]] + ([] if gallery is None else [gallery]):
        modality.check(values)
        assert modality.encode(values).isfinite().all()


@every_case
def test_check_refuses_other_shapes_and_types(case: Case) -> None:
    modality, values = build(case), case.values(3, seeded())
    modality.check(values)
    other_type = values.long() if values.is_floating_point() else values.float()
    for wrong in (values[..., None], values[0], other_type, values > 0):
        with pytest.raises(InputError, match="value = "):
            modality.check(wrong)


@every_case
def test_state_dict_carries_everything(case: Case) -> None:
    one, other, values = build(case, seed=0), build(case, seed=1), case.values(6, seeded())
    assert not torch.equal(decoded(one), decoded(other))
    other.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(decoded(one), decoded(other))
    assert torch.equal(one.encode(values), other.encode(values))
