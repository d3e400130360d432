"""Training with diffused modalities: Eq. (25), the times of the state distribution, and what is told to the network."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from networks import DIFFUSERS_DIT, DIFFUSERS_UNET, DIT, LAYERS, alive, random_model
from omegaconf import OmegaConf
from refusals import refused
from torch import Generator, Tensor

from mmdiff.config import Config, StatesConfig, load_config
from mmdiff.data import Batch
from mmdiff.model import MTDiffusionModel
from mmdiff.objective import BatchPosition, MTObjective, StateProbabilities
from mmdiff.observation import Noisy
from mmdiff.own_times import OwnTimes, draw_own_times, noisy_signals
from mmdiff.randomness import normal
from mmdiff.schedulers import MTDiffusionScheduler, MTFlowMatchScheduler, MTScheduler
from mmdiff.states import READ_OWN_TIME, TIME_NUMBERS, time_numbers
from mmdiff.training.flops import flops_of

KINDS = {
    "image": {"kind": "image", "channels": 1, "size": 8},
    "label": {"kind": "label", "num_classes": 3},
    "mask": {"kind": "mask", "num_classes": 3, "size": 8, "pattern_size": 2},
    "row": {"kind": "vector", "dim": 4},
}
DIFFUSED = {"mask": 1.5, "row": 1.0}
COLOUR = {**KINDS, "image": {"kind": "image", "channels": 3, "size": 8}}
BACKBONES = {
    "unet": LAYERS,
    "dit": DIT,
    "diffusers_unet": {"network": DIFFUSERS_UNET},
    "diffusers_dit": {"network": DIFFUSERS_DIT},
}
NAMES = sorted(KINDS)
T = 20
SCHEDULERS: list[MTScheduler] = [MTDiffusionScheduler(num_train_timesteps=T), MTFlowMatchScheduler(T)]


def model(diffused: dict[str, float] | None = DIFFUSED) -> MTDiffusionModel:
    return random_model(KINDS, diffused=diffused)


def objective(diffused: dict[str, float] | None = DIFFUSED, observed: float = 0.3, **settings: Any) -> MTObjective:
    weights = {"label": {"schedule": "bump", "scale": 0.5}, "mask": {"schedule": "bump", "scale": 0.5}}
    scheduler = MTDiffusionScheduler(num_train_timesteps=T, weights=weights)
    states = {name: StateProbabilities(0.5, observed) for name in NAMES} | {"image": StateProbabilities(0.0, 0.2)}
    return MTObjective(model(diffused), scheduler, states, dict.fromkeys(("label", "mask", "row"), 0.1), **settings)


def batch(count: int, missing: dict[str, list[int]] | None = None) -> Batch:
    generator = Generator().manual_seed(1)
    values = {name: module.examples(count, generator) for name, module in model().modalities.items()}
    present = {name: torch.ones(count, dtype=torch.bool) for name in values}
    for name, rows in (missing or {}).items():
        present[name][rows] = False
    return Batch(values, present)


def where(count: int, step: int = 5) -> BatchPosition:
    return BatchPosition(step, torch.arange(count), count)


# ------------------------------------------------------------------------------------------------- times and signals


def drawn(scheduler: MTScheduler, count: int, observed: float, denoised: Tensor, step: int = 7) -> OwnTimes:
    seen = {name: torch.rand(count, generator=Generator().manual_seed(k)) < observed for k, name in enumerate("ab")}
    aggregated = dict.fromkeys("ab", torch.ones(count, dtype=torch.bool))
    present = {"a": torch.ones(count, dtype=torch.bool), "b": torch.arange(count) % 4 > 0}
    seen["b"] &= present["b"]
    timesteps = scheduler.training_timesteps((torch.arange(count) + 0.5) / count)
    positions = torch.arange(count)
    return draw_own_times(
        scheduler, ["a", "b"], (aggregated, seen, denoised), present, timesteps, (0.3, 0.6), 3, step, positions
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_times_have_the_frequencies_of_the_closed_form(scheduler: MTScheduler) -> None:
    count, observed = 40_000, 0.25
    denoised = torch.arange(count) % 2 == 0
    times = drawn(scheduler, count, observed, denoised)
    timesteps = scheduler.training_timesteps((torch.arange(count) + 0.5) / count)
    equal = denoised & (times.share["a"] == scheduler.share(timesteps)) & (times.timesteps["a"] == timesteps)
    for rows, expected in (
        (denoised, {"observed": 0.7 * observed, "absent": 0.7 * (1 - observed) * 0.4}),
        (~denoised, {"observed": observed, "absent": (1 - observed) * (1 - READ_OWN_TIME)}),
    ):
        for name, p in expected.items():
            found = times.share["a"][rows] == {"observed": 0.0, "absent": 1.0}[name]
            # a time may fall on T as well, with probability 1/T of whole steps
            extra = (1 / T if name == "absent" and scheduler.first_timestep == 0 else 0) * (1 - sum(expected.values()))
            assert abs(float(found.double().mean()) - p - extra) < 4.5 * math.sqrt(p * (1 - p) / (count / 2)), name
    both = denoised & (times.timesteps["b"] == timesteps) & times.share["b"].lt(1)
    assert 0.29 < float(equal[denoised].double().mean()) < 0.3 + 0.7 / T + 0.02
    assert float(both[equal & (torch.arange(count) % 4 > 0)].double().mean()) > 0.85  # one time for all
    assert (times.share["b"][torch.arange(count) % 4 == 0] == 1).all()  # missing is absent
    moving = (times.share["a"] > 0) & (times.share["a"] < 1)
    assert not times.observed["a"][moving].any() and not times.aggregated["a"][moving].any()
    assert (times.observed["a"] == (times.share["a"] == 0)).all()
    part = drawn(scheduler, 64, observed, denoised[:64])
    assert len(part.share["a"]) == 64 and not torch.equal(
        part.share["a"], drawn(scheduler, 64, observed, denoised[:64], step=8).share["a"]
    )


def test_the_defaults_are_those_of_the_config() -> None:
    assert objective().time_probabilities == (StatesConfig().equal_time, StatesConfig().own_time)


def test_noisy_signals_have_the_moments_of_the_equation_and_independent_noise() -> None:
    whole, network, count = batch(2000), model(), 2000
    for scheduler in SCHEDULERS:
        timesteps = scheduler.training_timesteps(torch.full((count,), 0.4))
        share = scheduler.share(timesteps)
        times = OwnTimes({}, {}, dict.fromkeys(DIFFUSED, timesteps), dict.fromkeys(DIFFUSED, share))
        noisy = noisy_signals(network, scheduler, whole.values, times, 0, 5, torch.arange(count))
        s, sigma = scheduler.signal_and_noise(timesteps[0].item())
        noises = {"image": normal(0, 5, "noise", torch.arange(count), (1, 8, 8)).flatten(1)}
        for name, gain in DIFFUSED.items():
            signal = gain * network.modalities[name].signal(whole.values[name])
            noises[name] = ((noisy[name].sample - s * signal) / sigma).flatten(1)
            assert abs(float(noises[name].mean())) < 0.05 and float(noises[name].std()) == pytest.approx(1, abs=0.05)
        for one, other in itertools.combinations(noises.values(), 2):
            products = (one[:, :4] * other[:, :4]).mean(dim=0)
            assert float(products.abs().max()) < 5 / math.sqrt(count)
        again = noisy_signals(network, scheduler, whole.values, times, 0, 5, torch.arange(count))
        assert torch.equal(noisy["mask"].sample, again["mask"].sample)


# --------------------------------------------------------------------------------------------------- told to networks


def test_sixteen_numbers_tell_every_time_and_none_tells_absence() -> None:
    numbers = time_numbers(torch.linspace(0, 1, 1001))
    assert numbers.shape == (1001, TIME_NUMBERS) and not numbers[-1].any()
    assert torch.equal(numbers[0], torch.tensor([1.0] * 8 + [0.0] * 8))
    assert float((numbers[1:-1] - numbers[:-2]).norm(dim=1).min()) > 0.01


@pytest.mark.parametrize("kind", BACKBONES)
def test_time_0_is_observed_and_time_T_absent_in_bits(kind: str) -> None:
    torch.manual_seed(0)
    network = alive(MTDiffusionModel(COLOUR, {"kind": kind, **BACKBONES[kind]}, diffused=DIFFUSED))
    values, like = batch(4).values, torch.randn(4, 3, 8, 8, generator=Generator().manual_seed(2))
    everywhere, time = torch.ones(4, dtype=torch.bool), torch.full((4,), 3)

    def output(noisy: dict[str, Noisy], observed: dict[str, Tensor]) -> Tensor:
        return network(like, time, network.observation(values, {}, observed, like, noisy)).prediction

    signals = {name: network.signal(name, values[name]) for name in DIFFUSED}
    noise = {name: torch.randn_like(signal) for name, signal in signals.items()}
    at_zero = output({name: Noisy(x, torch.zeros(4)) for name, x in signals.items()}, {})
    at_end = output({name: Noisy(x, torch.ones(4)) for name, x in noise.items()}, {})
    assert torch.equal(at_zero, output({}, dict.fromkeys(DIFFUSED, everywhere)))
    assert torch.equal(at_end, output({}, {}))
    half = output({name: Noisy(x, torch.full((4,), 0.5)) for name, x in noise.items()}, {})
    later = output({name: Noisy(x, torch.full((4,), 0.6)) for name, x in noise.items()}, {})
    assert not torch.equal(half, later) and not torch.equal(half, at_end)


def test_it_costs_less_than_2_percent_and_nothing_where_it_is_off() -> None:
    plain, own = model(None), model()
    like = torch.zeros(2, 1, 8, 8)
    cost = [flops_of(lambda m=m: m(like, torch.ones(2), m.observation({}, {}, {}, like))) for m in (plain, own)]
    assert 1 <= cost[1] / cost[0] < 1.02
    old = {key: value for key, value in plain.config.items() if key != "diffused"}  # as older folders have it
    assert MTDiffusionModel.from_config(old).state_dict().keys() == plain.state_dict().keys() == own.state_dict().keys()
    changed = [n for n, x in own.state_dict().items() if x.shape != plain.state_dict()[n].shape]
    assert changed == ["backbone.flags.0.weight"]
    axes = own.slots(())
    assert len(axes["backbone.flags.0.weight"][1].slots) == own.backbone.flags[0].weight.shape[1]


# ------------------------------------------------------------------------------------------------------ one objective


def test_the_anchors_z_t_is_that_of_a_model_without_diffused_modalities() -> None:
    """Only rows whose mask has a time, and is then not aggregated, differ."""
    seen: list[Tensor] = []
    for diffused in (None, DIFFUSED):
        trained = objective(diffused)
        trained.model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
        trained(batch(32), where(32))
    same = (seen[0] == seen[1]).flatten(1).all(dim=1)
    assert 8 <= int(same.sum()) < 32
    nothing = objective(DIFFUSED, equal_time=0.0, own_time=0.0)
    nothing.model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    nothing(batch(32), where(32))
    assert torch.equal(seen[0], seen[2])


def test_parts_of_a_batch_average_to_the_whole() -> None:
    trained, whole, at = objective(), batch(16, {"mask": [1, 6], "row": [2]}), where(16)
    expected = trained(whole, at)
    parts = []
    for rows in torch.arange(16).chunk(4):
        values, present = ({name: x[rows] for name, x in part.items()} for part in whole[:2])
        parts.append(trained(Batch(values, present), at._replace(positions=at.positions[rows])))
    for name, term in expected.terms.items():
        torch.testing.assert_close(sum(part.terms[name] for part in parts) / 4, term, rtol=1e-5, atol=1e-6)


def test_what_is_missing_or_observed_counts_nothing_and_changes_nothing() -> None:
    for trained, whole in (
        (objective(observed=1.0, equal_time=0.0), batch(16)),
        (objective(), batch(16, {"mask": [*range(16)], "row": [*range(16)]})),
    ):
        terms = trained(whole, where(16)).terms
        assert float(terms["l2/mask"]) == float(terms["l2/row"]) == 0.0 and float(terms["l1"]) > 0
    one, other = batch(16, {"row": [3]}), batch(16, {"row": [3]})
    other.values["row"][3] = 1e3
    assert torch.equal(objective()(one, where(16)).loss, objective()(other, where(16)).loss)


# --------------------------------------------------------------------------------------------------------- from YAML


def shapes(tmp_path: Any, *overrides: str) -> Config:
    tree = {
        "name": "tiny",
        "data": {"source": "shapes", "options": {"rows": 24, "validation_rows": 8, "size": 16}},
        "modalities": {"image": {"kind": "image"}, "mask": {"kind": "mask", "num_classes": 7, "diffused": True}},
    }
    OmegaConf.save(OmegaConf.create(tree), tmp_path / "shapes.yaml")
    return load_config(tmp_path / "shapes.yaml", list(overrides))


def test_a_config_of_one_line_and_what_it_refuses(tmp_path: Any) -> None:
    from mmdiff.build import build

    built = build(shapes(tmp_path, "modalities.mask.gain=0.5"))
    assert built.model.gains == {"mask": 0.5} and built.config.modalities["mask"].weight.schedule == "none"
    for key, value, overrides in (
        ("modalities.image.diffused", True, ["modalities.image.diffused=true"]),
        ("modalities.label.diffused", True, ["modalities.label={kind: label, diffused: true}"]),
        ("modalities.mask.gain", 2.0, ["modalities.mask.diffused=false", "modalities.mask.gain=2"]),
        (
            "modalities.embedding.concentration",
            20.0,
            ["modalities.embedding={kind: embedding, concentration: 20.0, diffused: true}"],
        ),
    ):
        with refused(key, value):
            build(shapes(tmp_path, *overrides))
