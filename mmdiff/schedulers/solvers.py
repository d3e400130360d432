"""The schedulers of diffusers that may reverse u_t = z_t − c_t, and what the wrapper must know of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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

from mmdiff.errors import InputError


@dataclass(frozen=True)
class Solver:
    """What the wrapper must know of a diffusers scheduler."""

    scheduler: type
    options: tuple[str, ...]  # what `solver_config` may set; everything else belongs to the wrapper
    takes_generator: bool = False
    multistep: bool = False
    zero_terminal_snr: bool = True
    has_corrector: bool = False  # that re-uses an earlier sample
    is_stochastic: Callable[[Mapping[str, Any]], bool] = lambda options: False
    refused: Mapping[str, str] = field(default_factory=dict)  # {option: reason}
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # {prediction it takes: its own}; flows
    place: Callable[[Any, int], None] = lambda solver, count: solver.set_timesteps(count, device="cpu")


_MULTISTEP = ("solver_order", "solver_type", "lower_order_final", "steps_offset")
SOLVERS = {
    "DDPMScheduler": Solver(
        DDPMScheduler, ("variance_type", "steps_offset"), takes_generator=True, is_stochastic=lambda options: True
    ),
    "DDIMScheduler": Solver(
        DDIMScheduler,
        ("eta", "set_alpha_to_one", "steps_offset"),
        takes_generator=True,
        is_stochastic=lambda options: options.get("eta", 0.0) > 0,
    ),
    "DPMSolverMultistepScheduler": Solver(
        DPMSolverMultistepScheduler,
        (*_MULTISTEP, "algorithm_type", "euler_at_final", "final_sigmas_type", "lambda_min_clipped"),
        takes_generator=True,
        multistep=True,
        is_stochastic=lambda options: options.get("algorithm_type", "").startswith("sde"),
    ),
    "DEISMultistepScheduler": Solver(DEISMultistepScheduler, _MULTISTEP, multistep=True, zero_terminal_snr=False),
    "UniPCMultistepScheduler": Solver(
        UniPCMultistepScheduler,
        (*_MULTISTEP, "predict_x0", "disable_corrector", "final_sigmas_type"),
        multistep=True,
        has_corrector=True,
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
_FLOW_MULTISTEP = ("solver_order", "solver_type", "lower_order_final", "flow_shift")
FLOW_SOLVERS = {
    "FlowMatchEulerDiscreteScheduler": Solver(
        FlowMatchEulerDiscreteScheduler,
        ("shift",),
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
        (*_FLOW_MULTISTEP, "algorithm_type", "euler_at_final"),
        takes_generator=True,
        multistep=True,
        is_stochastic=SOLVERS["DPMSolverMultistepScheduler"].is_stochastic,
        arguments=_FLOW_SIGMAS,
    ),
    "UniPCMultistepScheduler": Solver(
        UniPCMultistepScheduler,
        (*_FLOW_MULTISTEP, "disable_corrector"),
        multistep=True,
        has_corrector=True,
        arguments=_FLOW_SIGMAS,
    ),
}
FLOW_REFUSED = {
    "FlowMatchHeunDiscreteScheduler": "keeps an earlier sample, in the base of encodings that have changed since",
    "FlowMatchLCMScheduler": "adds fresh noise to E[z_0 | z_t], which is right for distilled networks only",
    **{name: "solves the variance-preserving path" for name in SOLVERS if name not in FLOW_SOLVERS},
}


def trim_timesteps(solver: Any, count: int, multistep: bool) -> None:
    """Undo two slips of diffusers' spacings: a last timestep −1 too many, and repeated timesteps.

    np.arange(T, 0, −T/n) has n + 1 entries for some n (61 of 1000); the last would read ā_T as ā_0.
    """
    if len(solver.timesteps) > count:
        solver.timesteps = solver.timesteps[:count]
        if multistep:
            solver.sigmas = torch.cat([solver.sigmas[:count], solver.sigmas[-1:]])
            solver.num_inference_steps = count
    if len(solver.timesteps.unique()) < len(solver.timesteps):
        remedy = "the spacing repeats timesteps for this solver; take fewer, or trailing spacing"
        raise InputError("num_inference_steps", count, remedy)


def safe_eta(solver: Any, eta: float, timestep: int) -> float:
    """DDIM's η, lowered by 1e-6 in the rare step where float32 rounds 1 − ā_s − σ² below 0."""
    previous = timestep - solver.config.num_train_timesteps // solver.num_inference_steps
    alpha_bar = solver.alphas_cumprod[previous] if previous >= 0 else solver.final_alpha_cumprod
    deviation = eta * solver._get_variance(timestep, previous) ** 0.5
    return eta if 1 - alpha_bar - deviation**2 >= 0 else eta * (1 - 1e-6)
