"""Options of solvers: every value that is let through gives finite samples at every number of steps."""

from __future__ import annotations

import itertools
import typing
from typing import Any

import pytest
import torch

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


def finite_or_refused(kind: str, solver: str, options: dict[str, Any], total: int, counts: range, **more: Any) -> int:
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
    """Of all options, with every prediction and spacing; step counts of T = 20, and a few of T = 1000."""
    cls = SCHEDULERS[kind]
    options = {name: values_of(name, annotation) for name, annotation in cls.solvers[solver].options.items()}
    spacings = [{}] if kind == "flow_match" else [{"timestep_spacing": s} for s in ("trailing", "leading", "linspace")]
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values))
        for prediction, spacing in itertools.product(cls.prediction_types, spacings):
            finite_or_refused(kind, solver, chosen, 20, range(1, 21, 3), prediction_type=prediction, **spacing)
        finite_or_refused(kind, solver, chosen, 1000, range(1, 66, 16))


@pytest.mark.parametrize(
    ("kind", "solver", "options"),
    [
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
        ("flow_match", "FlowMatchEulerDiscreteScheduler", {"shift": 0}),
        ("flow_match", "FlowMatchEulerDiscreteScheduler", {"shift": "3"}),
    ],
)
def test_a_value_that_is_undocumented_or_gives_nan_is_refused_by_name(
    kind: str, solver: str, options: dict[str, Any]
) -> None:
    with pytest.raises(InputError) as refusal:
        SCHEDULERS[kind](solver=solver, solver_config=options)
    assert refusal.value.key == f"solver_config.{next(iter(options))}"


@pytest.mark.parametrize("steps", [True, 2.5, "10", None, 0, -1, 51])
def test_a_number_of_steps_is_a_whole_number_from_1_to_T(steps: Any) -> None:
    with pytest.raises(InputError, match="^num_inference_steps = "):
        SCHEDULERS["diffusion"](50).set_timesteps(steps)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_clipping_range_is_positive_and_finite(kind: str, value: float) -> None:
    with pytest.raises(InputError, match="^clip_sample_range = "):
        SCHEDULERS[kind](clip_sample_range=value)
