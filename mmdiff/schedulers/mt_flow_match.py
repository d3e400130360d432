"""Modality-weighted flow matching: the path z_σ = (1 − σ) z_0 + W(σ) E + σ ε, and its reversal."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.schedulers.base import MTScheduler
from mmdiff.schedulers.solvers import FLOW_REFUSED, FLOW_SOLVERS
from mmdiff.schedulers.weights import Coefficients

_LARGEST_SHIFT = 100.0


def resolution_shift(height: int, width: int) -> float:
    """s of a diffusion space (height, width): √(positions / 1024), which keeps the ratio of signal to noise that a mean
    over positions has in a space of 32 × 32, but 1 at least."""
    return max(1.0, math.sqrt(height * width / 1024))


class MTFlowMatchScheduler(MTScheduler, SchedulerMixin, ConfigMixin):
    """Forward process, training targets and reverse steps of modality-weighted flow matching (Lipman et al., 2023).

    Timesteps are σ T as in diffusers, any number in [0, T]; tables are float64 at σ = 1/T … 1. As s_T = 0, every weight
    schedule ends at W_T = 0.

    Args:
        num_train_timesteps: T.
        prediction_type: what the network predicts of u_t: "velocity", ε − z_0, or "sample".
        clip_sample: clip the predicted z_0 in every step, for every solver; off for latents.
        clip_sample_range: to ± this value.
        weights: as of `MTDiffusionScheduler`.
        solver: name of one of `FLOW_SOLVERS`.
        solver_config: the solver's own options.
        timestep_sampling: how training draws σ: "logit_normal", sigmoid(N(`logit_mean`, `logit_std`²)) as by Esser et
            al. (2024), or "uniform".
        logit_mean: of logit_normal.
        logit_std: of logit_normal.
        time_shift: s above 1 moves training and sampling towards the noise, σ -> s σ / (1 + (s − 1) σ), as images of
            many positions need (Esser et al., 2024, arXiv 2403.03206, Eq. (23)). A shift in `solver_config` comes
            first. In a config, "resolution" stands for `resolution_shift`.

    Raises:
        InputError: for an unknown or refused choice.
    """

    solvers, refused, prediction_types = FLOW_SOLVERS, FLOW_REFUSED, ("velocity", "sample")
    first_timestep = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        prediction_type: str = "velocity",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        weights: dict[str, dict[str, Any]] | None = None,
        solver: str = "DPMSolverMultistepScheduler",
        solver_config: dict[str, Any] | None = None,
        timestep_sampling: str = "logit_normal",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        time_shift: float = 1.0,
    ) -> None:
        checked = self._prepare(weights=weights, solver_config=solver_config)
        if not 0 < time_shift <= _LARGEST_SHIFT:
            raise InputError("time_shift", time_shift, f"needs a number above 0, up to {_LARGEST_SHIFT}; 1 is off")
        shift = {name: time_shift for name in self._traits.options if name in ("shift", "flow_shift")}
        total = self.config.num_train_timesteps
        self._solver = self._traits.scheduler(
            num_train_timesteps=total,
            **self._traits.arguments[self._solver_prediction],
            **((shift if time_shift != 1 else {}) | (self.config.solver_config or {})),
        )
        sigma = torch.arange(total + 1, dtype=torch.float64) / total  # σ_0 … σ_T
        signal = 1 - sigma
        self._set_path(Coefficients(signal[1:], sigma[1:], signal[1:] / signal[:-1]), checked)
        self.timesteps = torch.arange(total, 0, -1, dtype=torch.float32)

    @property
    def _solver_prediction(self) -> str:
        kind = self.config.prediction_type
        return kind if kind in self._traits.arguments else "velocity"

    def _timesteps_at(self, share: Tensor) -> Tensor:
        return (share * len(self)).float()

    def _shifted(self, share: Tensor) -> Tensor:
        shift = self.config.time_shift
        return shift * share / (1 + (shift - 1) * share)

    def _place_steps(self, num_inference_steps: int, index: int) -> Tensor:
        """Our timesteps come from the solver's σ: the multistep classes round theirs to whole numbers."""
        self._traits.place(self._solver, num_inference_steps)
        sigmas = self._solver.sigmas
        if not bool((sigmas[1:] < sigmas[:-1]).all()):
            remedy = "float32 cannot tell the steps apart; take fewer, or a shift nearer to 1"
            raise InputError("num_inference_steps", num_inference_steps, remedy)
        self._solver.set_begin_index(index)
        return self._solver.sigmas[:-1] * len(self)
