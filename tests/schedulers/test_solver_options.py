"""Options of solvers: every value that is let through gives finite samples at every number of steps."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused

from mmdiff.errors import InputError
from mmdiff.schedulers import SCHEDULERS, MTScheduler

UNIPC, DPM, DDIM, DDPM = (
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
)
VALUES = {  # of options whose type has no list of its own
    "solver_order": [1, 2, 3],
    "steps_offset": [0, 1],
    "eta": [0.0, 0.5, 1.0],
    "flow_shift": [0.5, 3.0],
    "shift": [0.5, 3.0],
    "disable_corrector": [[], [0]],
}
CASES = [(kind, solver) for kind, cls in SCHEDULERS.items() for solver in cls.solvers]


def values_of(option: str, annotation: Any) -> list[Any]:
    """Some values of an option's type: all of a choice, both of a switch."""
    choices = typing.get_args(annotation)
    return VALUES.get(option) or ([True, False] if choices[0] is bool else list(choices))


def last_sample(scheduler: MTScheduler, steps: int) -> torch.Tensor:
    scheduler.set_timesteps(steps, constant_encodings=True)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 1, 2, 2, generator=generator)
    for t in scheduler.timesteps:
        z = scheduler.step(0.5 * torch.tanh(z), t, z, generator=generator).prev_sample
    return z


def finite_or_refused(
    kind: str, solver: str, options: dict[str, Any], total: int, counts: Iterable[int], **more: Any
) -> int:
    """How many step counts gave finite samples; the others were refused in one line."""
    scheduler, done = SCHEDULERS[kind](total, solver=solver, solver_config=options, **more), 0
    for steps in counts:
        try:
            assert last_sample(scheduler, steps).isfinite().all(), (options, steps, more)
            done += 1
        except InputError as error:
            assert error.key in ("num_inference_steps", "solver_config.steps_offset")
    return done


@pytest.mark.parametrize(("kind", "solver"), CASES)
def test_every_value_is_finite_at_every_number_of_steps(kind: str, solver: str) -> None:
    for option, annotation in SCHEDULERS[kind].solvers[solver].options.items():
        for value in values_of(option, annotation):
            assert finite_or_refused(kind, solver, {option: value}, 20, range(1, 21)) >= 19


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "solver"), CASES)
def test_every_combination_is_finite(kind: str, solver: str) -> None:
    """Of all options, with every prediction and spacing; few and many steps of T = 20, and two numbers of T = 1000."""
    cls = SCHEDULERS[kind]
    options = {name: values_of(name, annotation) for name, annotation in cls.solvers[solver].options.items()}
    spacings = [{}] if kind == "flow_match" else [{"timestep_spacing": s} for s in ("trailing", "leading", "linspace")]
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values))
        for prediction, spacing in itertools.product(cls.prediction_types, spacings):
            finite_or_refused(kind, solver, chosen, 20, (1, 2, 3, 20), prediction_type=prediction, **spacing)
        finite_or_refused(kind, solver, chosen, 1000, (1, 33))


UNDOCUMENTED = [
    ("diffusion", UNIPC, {"lower_order_final": False}),
    ("diffusion", UNIPC, {"solver_type": "bh1"}),
    ("diffusion", UNIPC, {"predict_x0": False}),
    ("flow_match", UNIPC, {"lower_order_final": False}),
    ("flow_match", UNIPC, {"solver_type": "bh1"}),
    ("diffusion", UNIPC, {"disable_corrector": [-1]}),
    ("diffusion", DDIM, {"eta": 1.5}),
    ("diffusion", DDIM, {"eta": -0.1}),
    ("diffusion", DDIM, {"eta": float("nan")}),
    ("diffusion", DDIM, {"eta": "much"}),
    ("diffusion", DDIM, {"eta": True}),
    ("diffusion", DDIM, {"steps_offset": -1}),
    ("diffusion", DDIM, {"steps_offset": 10**30}),
    ("diffusion", DDPM, {"variance_type": "fixed_large_log"}),
    ("diffusion", DDPM, {"variance_type": "learned_range"}),
    ("diffusion", DPM, {"algorithm_type": "dpmsolver"}),
    ("diffusion", DPM, {"algorithm_type": "dpm"}),
    ("diffusion", DPM, {"solver_type": "bh2"}),
    ("diffusion", DPM, {"solver_order": 0}),
    ("diffusion", DPM, {"solver_order": 4}),
    ("diffusion", DPM, {"solver_order": 2.5}),
    ("diffusion", DPM, {"final_sigmas_type": "sigma_min"}),
    ("diffusion", UNIPC, {"final_sigmas_type": "one"}),
    ("diffusion", DPM, {"lambda_min_clipped": -5.1}),
    ("diffusion", "DEISMultistepScheduler", {"solver_type": "midpoint"}),
    ("flow_match", DPM, {"flow_shift": 0.0}),
    ("flow_match", DPM, {"flow_shift": -1.0}),
    ("flow_match", DPM, {"flow_shift": float("inf")}),
    ("flow_match", DPM, {"flow_shift": 1e30}),
    ("flow_match", UNIPC, {"flow_shift": 1e-30}),
    ("flow_match", "FlowMatchEulerDiscreteScheduler", {"shift": 0}),
    ("flow_match", "FlowMatchEulerDiscreteScheduler", {"shift": "3"}),
]


def test_a_value_that_is_undocumented_or_gives_nan_is_refused_by_name() -> None:
    for kind, solver, options in UNDOCUMENTED:
        with refused(f"solver_config.{next(iter(options))}"):
            SCHEDULERS[kind](solver=solver, solver_config=options)


NAN, INF = float("nan"), float("inf")
HOLLOW = [torch.empty((), device="meta"), torch.tensor([1.0]).to_sparse(), torch.tensor(1j), iter([1.0])]
NO_NUMBERS = [None, True, "x", NAN, INF, -INF, [1], {}, 1e300, *HOLLOW]
WRONG = {
    "num_train_timesteps": [0, -1, 2.5, 2**40, *NO_NUMBERS],
    "clip_sample_range": [0.0, -1.0, *NO_NUMBERS],
    "logit_std": [0, *NO_NUMBERS],
    "logit_mean": [None, True, "x", NAN, INF, [1], {}],
    "clip_sample": [None, "no", 1, []],
    "solver": [None, 1, [1], {}],
    "solver_config": [1, "x", [1], True],
    "weights": [1, "x", [1], True, {"label": 1}],
    "timestep_sampling": [None, 1, [1]],
}
WRONG_VARIANCES = {
    "beta_start": [-0.1, *NO_NUMBERS],
    "beta_end": [1.5, *NO_NUMBERS],
    "beta_schedule": [None, 1, []],
    "trained_betas": [1, "x", *HOLLOW, ["a"] * 50, [NAN] * 50, [-0.1] * 50, [INF] * 50, [0.1]],
    "rescale_betas_zero_snr": [None, "no", 1],
}
WRONG_ENTRIES = {
    "scale": [-1, *NO_NUMBERS],
    "schedule": [None, 1, "x", []],
    "parameters": [None, 1, "x", *HOLLOW, [], ["a"], [NAN], [1e30]],
    "log_scale": NO_NUMBERS,
    "learn_scale": [None, "no", 1],
    "shape": [1],
}


def test_an_argument_of_another_type_or_range_is_refused_by_name() -> None:
    cases = [(kind, *item) for kind in SCHEDULERS for item in WRONG.items()]
    for kind, key, values in [*cases, *(("diffusion", *item) for item in WRONG_VARIANCES.items())]:
        for value in values:
            with refused(key):
                SCHEDULERS[kind](**{"num_train_timesteps": 50, key: value})


def test_an_entry_of_the_weights_is_refused_by_name() -> None:
    for key, values in WRONG_ENTRIES.items():
        for value in values:
            with refused(f"weights.label.{key}"):
                SCHEDULERS["flow_match"](50, weights={"label": {"schedule": "learned", key: value}})


def test_numbers_of_numpy_and_torch_are_arguments() -> None:
    given = {"num_train_timesteps": np.int64(3), "trained_betas": torch.tensor([0.25, 0.5, 0.75])}
    given["weights"] = {"label": {"schedule": "bump", "scale": Decimal("0.125")}}
    config = SCHEDULERS["diffusion"](**given, solver=DDIM, solver_config={"eta": np.float32(0.5)}).config
    assert (config.num_train_timesteps, config.trained_betas, config.solver_config) == (
        3, [0.25, 0.5, 0.75], {"eta": 0.5},
    )  # fmt: skip
    assert config.weights["label"]["scale"] == 0.125
    assert len(SCHEDULERS["flow_match"](torch.tensor(3))) == 3


TIMESTEPS = [None, "x", [], NAN, np.array([1, 2]), torch.tensor([1, 2]), torch.tensor([1.0]).to_sparse(), 1j]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_what_is_asked_of_a_scheduler_is_refused_by_name(kind: str) -> None:
    cls = SCHEDULERS[kind]
    for config in (None, 3, "a/b", [], {1: 2}):
        with refused("config"):
            cls.from_config(config)
    with refused("solvr", DDIM, "did you mean solver"):
        cls.from_config(cls(20).config, solvr=DDIM)
    with refused("weights.label.schedule", "learned"):
        cls(2, weights={"label": {"schedule": "learned"}})
    for place in ("./nowhere", None):
        with refused("scheduler"):
            cls.from_pretrained(place)
    scheduler = cls(50)
    with refused("constant_encodings", "no"):
        scheduler.set_timesteps(3, constant_encodings="no")
    for steps in (True, 2.5, "10", None, 0, -1, 51):
        with refused("num_inference_steps", steps):
            scheduler.set_timesteps(steps)
    scheduler.set_timesteps(3)
    for timestep in TIMESTEPS:
        with refused("timestep"):
            scheduler.step(torch.zeros(1, 1, 2, 2), timestep, torch.zeros(1, 1, 2, 2))
    with refused("count", "all"):
        scheduler.rewind("all")


BETAS = [
    {"beta_schedule": "linear", "beta_start": 0.0, "beta_end": 0.0},
    {"beta_schedule": "linear", "beta_start": 0.0, "beta_end": 1.0},
    {"beta_schedule": "linear", "beta_start": 1.0, "beta_end": 1.0},
    {"beta_schedule": "linear", "beta_start": 0.9, "beta_end": 0.1},
    {"beta_schedule": "scaled_linear", "beta_start": 1e-9, "beta_end": 1e-8},
    {"trained_betas": [0.1, 0.0] * 10},
    {"trained_betas": [0.1] * 19 + [1.0]},
    {"trained_betas": [0.9999999] * 20},
    {"trained_betas": [0.5] * 20},
]


@pytest.mark.parametrize("solver", SCHEDULERS["diffusion"].solvers)
def test_betas_give_finite_samples_or_are_refused(solver: str) -> None:
    for betas in BETAS:
        for zero, prediction in itertools.product((False, True), SCHEDULERS["diffusion"].prediction_types):
            more = {**betas, "rescale_betas_zero_snr": zero, "prediction_type": prediction}
            try:
                finite_or_refused("diffusion", solver, {}, 20, range(1, 21, 6), **more)
            except InputError as error:
                assert error.key in ("betas", "prediction_type", "solver")
