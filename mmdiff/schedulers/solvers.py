"""The schedulers of diffusers that may reverse u_t = z_t − c_t, with their options and limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from pydantic import Field

from mmdiff.errors import InputError
from mmdiff.schedulers.arguments import check_value


@dataclass(frozen=True)
class Solver:
    """Options and limits of a diffusers scheduler."""

    scheduler: type
    options: Mapping[str, Any]  # {option of `solver_config`: type of its values}
    takes_generator: bool = False
    multistep: bool = False
    zero_terminal_snr: bool = True
    has_corrector: bool = False  # one that re-uses an earlier sample
    is_stochastic: Callable[[Mapping[str, Any]], bool] = lambda options: False
    refused: Mapping[str, str] = field(default_factory=dict)  # {option: reason}
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of flows: {prediction type: arguments}
    place: Callable[[Any, int], None] = lambda solver, count: solver.set_timesteps(count, device="cpu")


_ORDER = Annotated[int, Field(strict=True, ge=1, le=3)]
_SWITCH = Annotated[bool, Field(strict=True)]
_COUNT = Annotated[int, Field(strict=True, ge=0, le=100_000)]
_SHIFT = Annotated[float, Field(strict=True, ge=0.01, le=100)]  # beyond, float32 cannot tell the steps apart
_ORDERS = {"solver_order": _ORDER, "lower_order_final": _SWITCH}
_DPM = {
    "solver_type": Literal["midpoint", "heun"],
    "algorithm_type": Literal["dpmsolver++", "sde-dpmsolver++"],
    "euler_at_final": _SWITCH,
}
_UNIPC = {
    "solver_order": _ORDER,
    "solver_type": Literal["bh2"],
    "disable_corrector": list[_COUNT],
    "lower_order_final": Literal[True],
}
_NOISE_FORM = "the solvers in noise form divide by √ā_T, which is 0 on these schedules"
_UNIPC_REFUSED = {  # measured: NaN at the last step, or at every one
    "lower_order_final": "must stay true: in its last step UniPC's higher order divides by σ = 0",
    "predict_x0": "must stay true: the noise form divides by √ā_T, which is 0 on these schedules",
    "solver_type": "with bh1 the last step, to σ = 0, is NaN: its factor h is infinite there",
}
SOLVERS = {
    "DDPMScheduler": Solver(
        DDPMScheduler,
        {"variance_type": Literal["fixed_small", "fixed_small_log", "fixed_large"], "steps_offset": _COUNT},
        takes_generator=True,
        is_stochastic=lambda options: True,
        refused={
            "variance_type": "learned ones need a network output of double width; fixed_large_log takes the root of "
            "log β_t, which is below 0"
        },
    ),
    "DDIMScheduler": Solver(
        DDIMScheduler,
        {"eta": Annotated[float, Field(strict=True, ge=0, le=1)], "set_alpha_to_one": _SWITCH, "steps_offset": _COUNT},
        takes_generator=True,
        is_stochastic=lambda options: options.get("eta", 0.0) > 0,
    ),
    "DPMSolverMultistepScheduler": Solver(
        DPMSolverMultistepScheduler,
        _ORDERS | _DPM | {"steps_offset": _COUNT, "final_sigmas_type": Literal["zero"]},
        takes_generator=True,
        multistep=True,
        is_stochastic=lambda options: options.get("algorithm_type", "").startswith("sde"),
        refused={
            "algorithm_type": _NOISE_FORM,
            "final_sigmas_type": "with sigma_min the last step of trailing spacing has length 0: NaN at higher orders",
            "lambda_min_clipped": "gives NaN with trailing spacing; take rescale_betas_zero_snr, or leave it out",
        },
    ),
    "DEISMultistepScheduler": Solver(
        DEISMultistepScheduler,
        _ORDERS | {"solver_type": Literal["logrho"], "steps_offset": _COUNT},
        multistep=True,
        zero_terminal_snr=False,
    ),
    "UniPCMultistepScheduler": Solver(
        UniPCMultistepScheduler,
        _UNIPC
        | {"steps_offset": _COUNT, "final_sigmas_type": Literal["zero", "sigma_min"], "predict_x0": Literal[True]},
        multistep=True,
        has_corrector=True,
        refused=_UNIPC_REFUSED,
    ),
}
_REFUSED = (
    "works in σ-space, where the shift u_t = z_t − c_t would need scaled units and σ_max ≈ 2e4 on the cosine schedule"
)
REFUSED = {
    **{f"{name}DiscreteScheduler": _REFUSED for name in ("Euler", "EulerAncestral", "Heun", "LMS", "KDPM2")},
    "KDPM2AncestralDiscreteScheduler": _REFUSED,
    "FlowMatchEulerDiscreteScheduler": "solves another path than that of Eq. (2); take scheduler.kind flow_match",
    "PNDMScheduler": "keeps earlier samples, in the base of encodings that have changed since",
}

# ------------------------------------------------------------------------------------------------------ flow matching

_FLOW_SIGMAS = {
    "velocity": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "sample": {"use_flow_sigmas": True, "prediction_type": "sample"},
}
FLOW_SOLVERS = {
    "FlowMatchEulerDiscreteScheduler": Solver(
        FlowMatchEulerDiscreteScheduler,
        {"shift": _SHIFT},
        arguments={"velocity": {}},
        # its own spacing ends with a step from σ = 1/T; diffusers' pipelines pass this one
        place=lambda solver, count: solver.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count), device="cpu"),
        refused={
            "stochastic_sampling": "adds fresh noise to E[z_0 | z_t], which is right for distilled networks only and "
            "halves the variance around every mode; take DPMSolverMultistepScheduler, algorithm_type sde-dpmsolver++"
        },
    ),
    "DPMSolverMultistepScheduler": Solver(
        DPMSolverMultistepScheduler,
        _ORDERS | _DPM | {"flow_shift": _SHIFT},
        takes_generator=True,
        multistep=True,
        is_stochastic=SOLVERS["DPMSolverMultistepScheduler"].is_stochastic,
        refused={"algorithm_type": _NOISE_FORM},
        arguments=_FLOW_SIGMAS,
    ),
    "UniPCMultistepScheduler": Solver(
        UniPCMultistepScheduler,
        _UNIPC | {"flow_shift": _SHIFT},
        multistep=True,
        has_corrector=True,
        arguments=_FLOW_SIGMAS,
        refused=_UNIPC_REFUSED,
    ),
}
FLOW_REFUSED = {
    "FlowMatchHeunDiscreteScheduler": "keeps an earlier sample, in the base of encodings that have changed since",
    "FlowMatchLCMScheduler": "adds fresh noise to E[z_0 | z_t], which is right for distilled networks only",
    **{name: "solves the variance-preserving path" for name in SOLVERS if name not in FLOW_SOLVERS},
}


def check_options(solver: Solver, options: Mapping[str, Any]) -> None:
    """Refuse options that the solver does not take, and values that its class does not document or that give NaN.

    Raises:
        InputError: naming `solver_config.<option>`.
    """
    for key, value in options.items():
        option, reason = f"solver_config.{key}", solver.refused.get(key)
        if key not in solver.options:
            raise InputError(option, value, reason or f"choose from {', '.join(solver.options)}")
        check_value(option, value, solver.options[key], reason)


def trim_timesteps(solver: Any, count: int, multistep: bool) -> None:
    """Correct or refuse faults of diffusers' spacings: an extra last timestep −1, one beyond the table, repeated ones.

    np.arange(T, 0, −T/n) has n + 1 entries for some n (61 of 1000); the last would read ā_T as ā_0.
    """
    if len(solver.timesteps) > count:
        solver.timesteps = solver.timesteps[:count]
        if multistep:
            solver.sigmas = torch.cat([solver.sigmas[:count], solver.sigmas[-1:]])
            solver.num_inference_steps = count
    if int(solver.timesteps.max()) >= solver.config.num_train_timesteps:
        total = solver.config.num_train_timesteps
        remedy = f"leaves the {total} timesteps with num_inference_steps = {count}; take 0, or fewer steps"
        raise InputError("solver_config.steps_offset", solver.config.steps_offset, remedy)
    if len(solver.timesteps.unique()) < len(solver.timesteps):
        remedy = "the spacing repeats timesteps for this solver; take fewer, or trailing spacing"
        raise InputError("num_inference_steps", count, remedy)


def safe_eta(solver: Any, eta: float, timestep: int) -> float:
    """DDIM's η, lowered by 1e-6 in the rare step in which float32 rounds 1 − ā_s − σ² below 0."""
    previous = timestep - solver.config.num_train_timesteps // solver.num_inference_steps
    alpha_bar = solver.alphas_cumprod[previous] if previous >= 0 else solver.final_alpha_cumprod
    deviation = eta * solver._get_variance(timestep, previous) ** 0.5
    return eta if 1 - alpha_bar - deviation**2 >= 0 else eta * (1 - 1e-6)
