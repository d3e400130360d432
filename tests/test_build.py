"""A config becomes parts: the data fill in what they determine, the config's word wins, what cannot be is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from unittest.mock import ANY

import datasets
import pytest
import torch
from PIL import Image
from refusals import refused

from mmdiff.build import build, build_model, build_objective, build_scheduler, state_probabilities
from mmdiff.config import Config, ModalityConfig
from mmdiff.resolve import resolve, resolve_scheduler
from mmdiff.schedulers import SCHEDULERS
from mmdiff.states import DISTRIBUTIONS, StateProbabilities

Configure = Callable[..., Config]


def rows(mode: str = "L", size: tuple[int, int] = (8, 8), labels: Any = None) -> datasets.Dataset:
    """Four black images with the labels 0, 2, None, 1."""
    features = {"image": datasets.Image(), "label": labels or datasets.Value("int64")}
    columns = {"image": [Image.new(mode, size)] * 4, "label": [0, 2, None, 1]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_the_data_fill_in_what_the_config_leaves_out(configure: Configure) -> None:
    for mode, channels in [("L", 1), ("RGB", 3)]:
        config = resolve(configure(), rows(mode, size=(12, 8)))  # PIL counts (width, height)
        assert config.modalities["image"].settings() == {"channels": channels, "size": [8, 12]}
        assert config.modalities["label"].settings() == {"num_classes": 3}  # a bare integer column: its largest id + 1
        named = rows(labels=datasets.ClassLabel(num_classes=5))
        assert resolve(configure(), named).modalities["label"].settings() == {
            "num_classes": 5,
            "names": list("01234"),
            "unknown": -1,
        }


def test_resolving_twice_changes_nothing(configure: Configure) -> None:
    once = resolve(configure(), rows())
    assert resolve(once, rows()) == once


def test_explicit_settings_win(configure: Configure) -> None:
    config = resolve(configure("modalities.label.num_classes=20", "modalities.image.scale=0.5"), rows())
    assert config.modalities["label"].settings() == {"num_classes": 20}
    assert config.modalities["image"].settings() == {"channels": 1, "size": [8, 8], "scale": 0.5}
    model = build_model(config)
    assert model.modalities["label"].table.shape == (20, 1, 8, 8)


def test_a_wrong_explicit_size_is_refused_with_row_and_column(configure: Configure) -> None:
    from mmdiff.build import build

    with refused("data.columns.image=image, row 0 of digits: image", "16x16", "32x32", "resize: true"):
        build(configure("modalities.image.size=[32,32]", "data.cache_mib=512"))


MISFITS = [
    ("modalities.label.kind=labels", "modalities.label.kind", "labels"),
    ("backbone.kind=vnet", "backbone.kind", "vnet"),
    ("backbone.layers=3", "backbone.layers", 3),
    (
        "modalities.label.klasses=3",
        "modalities.label.klasses",
        3,
    ),
    ("modalities.image.shape=3", "modalities.image.shape", 3),
    ("modalities.image.head=true", "modalities.image.head", True),
    ("data.columns.label=digit", "data.columns.label", "digit"),
    ("data.columns.image=label", "data.columns.image=label: row 0 of digits: image", "int"),
    ("data.columns.label=image", "data.columns.label=image: label", ANY),
]


def test_what_does_not_fit_is_named(configure: Configure) -> None:
    for override, key, value in MISFITS:
        with refused(key, value):
            resolve(configure(override), rows())


def test_a_backbone_that_does_not_fit_the_size_is_refused(configure: Configure) -> None:
    config = resolve(configure(), rows(size=(6, 6)))
    with refused("backbone.block_out_channels", [8, 16], "(6, 6)"):
        build_model(config)


def test_weights_with_which_sampling_would_start_wrong_are_refused(configure: Configure) -> None:
    linear = ["scheduler.beta_schedule=linear", "scheduler.num_train_timesteps=1000"]
    config = configure(*linear, "modalities.label.weight={schedule: constant, scale: 1.5}")
    with refused(
        "modalities.label.weight",
        {"schedule": "constant", "scale": 1.5, "learn_scale": False},
        "allow_nonzero_terminal",
    ):
        build_scheduler(resolve(config, rows()))
    allowed = configure(*linear, "scheduler.allow_nonzero_terminal=true")
    assert build_scheduler(resolve(allowed, rows())).cumulative_weights("label").max().item() == pytest.approx(1.5)


SCHEDULER_MISTAKES = [
    ("scheduler.beta_schedule=cubic", "scheduler.beta_schedule", "cubic"),
    ("scheduler.kind=flow", "scheduler.kind", "flow"),
    ("scheduler.beta_strat=1", "scheduler.beta_strat", 1),
    ("scheduler.beta_start=much", "scheduler.beta_start", "much"),
    ("scheduler={kind: flow_match, beta_start: 0.1}", "scheduler.beta_start", 0.1),
    ("scheduler={kind: flow_match, solver: DDIMScheduler}", "scheduler.solver", "DDIMScheduler"),
    ("scheduler={timestep_sampling: cubic}", "scheduler.timestep_sampling", "cubic"),
    ("scheduler.solver=PNDMScheduler", "scheduler.solver", "PNDMScheduler"),
    ("scheduler.solver_config={zeta: 1}", "scheduler.solver_config.zeta", 1),
]


def test_scheduler_mistakes_are_named_as_in_the_config(configure: Configure) -> None:
    for override, key, value in SCHEDULER_MISTAKES:
        with refused(key, value):
            build_scheduler(resolve(configure(override), rows()))


def test_a_time_shift_by_resolution_becomes_a_number(configure: Configure) -> None:
    """√(positions / 1024) of the diffusion space, 1 at least; other words are refused."""
    flow = "scheduler.kind=flow_match"
    for size, shift in ((16, 1.0), (64, 2.0)):
        config = resolve(configure(flow, "scheduler.time_shift=resolution"), rows(size=(size, size)))
        assert build_scheduler(config).config.time_shift == shift
        assert resolve(config, rows(size=(size, size))) == config
    for wrong in ("large", 0.0, -1.0, 1e6):
        with refused("scheduler.time_shift", wrong):
            build_scheduler(resolve(configure(flow, f"scheduler.time_shift={wrong}"), rows()))


def test_the_resolved_config_lists_every_argument_of_the_scheduler(configure: Configure) -> None:
    for kind, cls in SCHEDULERS.items():
        config = resolve(configure(f"scheduler.kind={kind}"), rows())
        assert set(config.scheduler.model_dump()) == {"kind", *inspect.signature(cls).parameters} - {"weights"}
        assert resolve_scheduler(config) == config
        built = build_scheduler(config)
        assert type(built) is cls
        for key, value in config.scheduler.model_dump(exclude={"kind"}).items():
            assert built.config[key] == value
    older = configure("scheduler.timestep_spacing=leading")  # a config from before timestep_sampling
    assert resolve_scheduler(older).scheduler.model_dump()["timestep_sampling"] == "uniform"


def laws(config: Config) -> dict[str, StateProbabilities]:
    resolved = resolve(config, rows())
    return {name: state_probabilities(resolved, name) for name in ("image", "label")}


def test_state_laws(configure: Configure) -> None:
    given = ["states.aggregated=0.4", "states.observed=0.2", "states.anchor_observed=0.1"]
    image = StateProbabilities(0.0, 0.1)
    assert laws(configure(*given)) == {"image": image, "label": StateProbabilities(0.4, 0.2)}
    own = "modalities.label.states={aggregated: 0.7}"
    assert laws(configure(*given, own)) == {"image": image, "label": StateProbabilities(0.7, 0.2)}
    own = "modalities.label.states={aggregated: 0, observed: 0}"  # zero is a value, not "unset"
    assert laws(configure(*given, own)) == {"image": image, "label": StateProbabilities(0.0, 0.0)}
    assert laws(configure(*given, "states.distribution=each_alone")) == {
        "image": image,
        "label": StateProbabilities(0.4, 0.2),
    }
    assert laws(configure(*given, "states.distribution=source")) == {
        "image": StateProbabilities(0.0, 0.0),
        "label": StateProbabilities(1.0, 0.0),
    }
    assert laws(configure(*given, "states.distribution=heads")) == {
        "image": StateProbabilities(0.0, 0.0),
        "label": StateProbabilities(0.0, 0.0),
    }


def test_a_modality_without_weight_is_never_aggregated(configure: Configure) -> None:
    for weight in ["{schedule: none}", "{scale: 0}"]:
        for law in ("independent", "source"):
            config = configure(f"states.distribution={law}", f"modalities.label.weight={weight}")
            assert state_probabilities(config, "label").aggregated == 0.0


def test_the_seed_fixes_the_initial_weights_and_touches_no_other_random_number(configure: Configure) -> None:
    config, other = (resolve(configure(f"train.seed={seed}"), rows()) for seed in (3, 4))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = build_model(config).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    again, different = build_model(config).state_dict(), build_model(other).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["modalities.label.table"], different["modalities.label.table"])


def test_the_objective_has_the_configs_numbers(configure: Configure) -> None:
    options = ["modalities.label.loss_weight=0.3", "loss={min_snr_gamma: 5, terminal: 0.25}", "train.seed=9"]
    config = resolve(configure(*options, "modalities.label.weight={schedule: learned, learn_scale: true}"), rows())
    objective = build_objective(config, build_model(config), build_scheduler(config))
    assert objective.loss_weights == {"label": 0.3}
    assert (objective.min_snr_gamma, objective.terminal_weight, objective.seed) == (5, 0.25, 9)
    assert objective.schedule_scales["label"].requires_grad
    assert objective.distribution is DISTRIBUTIONS["independent"]
    assert objective.log_std is None
    config = resolve(configure("states.distribution=each_alone", "loss.uncertainty=true"), rows())
    objective = build_objective(config, build_model(config), build_scheduler(config))
    assert objective.distribution is DISTRIBUTIONS["each_alone"]
    assert not objective.log_std.weight.any() and not objective.log_std.bias.any()  # σ = 1, whatever the seed


def test_the_name_of_a_modality_is_refused_before_its_column_is_looked_for(configure: Configure) -> None:
    for name in ["../x", "a b", "to", "a.b", "", "1st", "x" * 101]:
        config = configure()
        config.modalities[name] = ModalityConfig(kind="label")
        with refused("modalities"):
            build(config)


def test_a_kind_is_refused_before_data_are_opened(configure: Configure) -> None:
    with refused("modalities.label.kind", "labels"):
        build(configure("modalities.label.kind=labels", "data.source=nowhere.csv"))
