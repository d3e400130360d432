"""The modality-weighted forward process on the variance-preserving path, Eq. (1)–(6), and its reversal."""

from __future__ import annotations

import warnings
from typing import Any

from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, arange, cat, ones

from mmdiff.errors import InputError
from mmdiff.schedulers.base import MTScheduler
from mmdiff.schedulers.path import Table
from mmdiff.schedulers.solvers import REFUSED, SOLVERS, safe_eta, trim_timesteps
from mmdiff.schedulers.weights import Coefficients

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("v_prediction", "epsilon", "sample")
MAX_TERMINAL_WEIGHT = 0.1
_BASE_ARGUMENTS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
_BASE_ARGUMENTS += ("prediction_type", "timestep_spacing")


class MTDiffusionScheduler(MTScheduler, SchedulerMixin, ConfigMixin):
    """Forward process, training targets and reverse steps of the modality-weighted diffusion.

    Timesteps count 0 … T − 1 as in diffusers; index k is t = k + 1 in the equations. Tables are float64.

    Args:
        num_train_timesteps: T.
        beta_schedule: "squaredcos_cap_v2", "linear" or "scaled_linear", as in diffusers.
        beta_start: of the linear schedules.
        beta_end: of the linear schedules.
        trained_betas: T numbers in place of a schedule.
        rescale_betas_zero_snr: make ā_T zero, as in diffusers.
        prediction_type: what the network predicts of u_t: "v_prediction", "epsilon" or "sample".
        timestep_spacing: "trailing", "leading" or "linspace", as in diffusers.
        clip_sample: clip the predicted z_0 in every step, for every solver; off for latents.
        clip_sample_range: to ± this value.
        weights: {modality: {"schedule": name, "scale": peak of W_t}}; schedules: constant, bump, early, none,
            learned (with "parameters" and "log_scale", see `mmdiff.schedulers.weights`).
        solver: name of one of `SOLVERS`.
        solver_config: the solver's own options, DDIM's `eta` included.
        literal_alpha: divide a standard schedule by N + 1, which destroys the anchor; for study, with a warning.
        allow_nonzero_terminal: accept W_T > 0.1, so that z_T is not N(0, I).
        timestep_sampling: how training draws t/T: "uniform" or "logit_normal".
        logit_mean: of logit_normal.
        logit_std: of logit_normal.

    Raises:
        InputError: for an unknown or refused choice.
    """

    solvers, refused, prediction_types = SOLVERS, REFUSED, PREDICTION_TYPES
    first_timestep = 0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "squaredcos_cap_v2",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "v_prediction",
        timestep_spacing: str = "trailing",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        weights: dict[str, dict[str, Any]] | None = None,
        solver: str = "DDPMScheduler",
        solver_config: dict[str, Any] | None = None,
        literal_alpha: bool = False,
        allow_nonzero_terminal: bool = False,
        timestep_sampling: str = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
    ) -> None:
        checked = self._prepare(weights=weights, solver_config=solver_config, trained_betas=trained_betas)
        self._check_choice("beta_schedule", BETA_SCHEDULES)
        self._check_choice("timestep_spacing", ("trailing", "leading", "linspace"))
        self._check_combinations()
        self._arguments = self._base_arguments(len(checked))
        self._forward_process = self._build_forward_process()
        self._solver = self._build_solver()
        self._check_decay()
        self.alphas = 1.0 - self._forward_process.betas.double()
        self.alphas_cumprod = self.alphas.cumprod(0)
        path = Coefficients(self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt(), self.alphas.sqrt())
        self._set_path(path, checked)
        self._tables["a_bar"] = Table(self.alphas_cumprod, 1.0)
        self._check_terminal_weights()
        self.timesteps = arange(len(self) - 1, -1, -1)

    # ------------------------------------------------------------------------------------------------ construction

    def _check_combinations(self) -> None:
        config = self.config
        if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
            remedy = "at zero terminal SNR the noise holds nothing of z_0; use v_prediction"
            raise InputError("prediction_type", "epsilon", remedy)
        if config.rescale_betas_zero_snr and not self._traits.zero_terminal_snr:
            raise InputError("solver", config.solver, "divides by √ā_T; with rescale_betas_zero_snr use another solver")
        if config.trained_betas is not None and len(config.trained_betas) != config.num_train_timesteps:
            raise InputError("trained_betas", len(config.trained_betas), "needs num_train_timesteps entries")

    def _base_arguments(self, auxiliary: int) -> dict[str, Any]:
        """The arguments that fix the betas, the same for every diffusers class."""
        arguments = {key: self.config[key] for key in _BASE_ARGUMENTS}
        if self.config.literal_alpha:
            arguments["trained_betas"] = self._literal_betas(arguments, auxiliary)
        return arguments

    def _literal_betas(self, arguments: dict[str, Any], auxiliary: int) -> list[float]:
        """1 − (1 − β_t)/(N + 1): the betas of a standard schedule divided by N + 1."""
        standard = 1.0 - DDPMScheduler(**arguments, clip_sample=False).betas.double()
        alphas = standard / (auxiliary + 1)
        lost = int((alphas.cumprod(0) >= 1e-3).sum()) + 1
        warnings.warn(
            f"literal_alpha=True divides the schedule by N + 1 = {auxiliary + 1}: ā_t < 1e-3 after {lost} of "
            f"{self.config.num_train_timesteps} steps, the anchor is destroyed; for study only",
            stacklevel=4,
        )
        return (1.0 - alphas).tolist()

    def _build_forward_process(self) -> DDPMScheduler:
        """The scheduler for noise and targets in training. Multistep solvers know only the timesteps of the last
        `set_timesteps`."""
        return DDPMScheduler(
            **self._arguments, rescale_betas_zero_snr=self.config.rescale_betas_zero_snr, clip_sample=False
        )

    def _build_solver(self) -> SchedulerMixin:
        arguments = {**self._arguments, **(self.config.solver_config or {})}
        self._eta = arguments.pop("eta", 0.0)
        if self.config.rescale_betas_zero_snr:
            arguments["rescale_betas_zero_snr"] = True
        if not self._traits.multistep:
            arguments["clip_sample"] = False  # the wrapper clips z_0 for every solver
        return self._traits.scheduler(**arguments)

    def _check_decay(self) -> None:
        """Refuse ā_t that does not fall at every step, from below 1 to above 0: solvers would divide by 0. With
        `rescale_betas_zero_snr` ā_T is 0."""
        if self.config.literal_alpha:
            return  # its ā_t may underflow; `_place_steps` checks the steps in use
        alpha_bar = cat([ones(1), self._forward_process.alphas_cumprod])
        falls = bool((alpha_bar[1:] < alpha_bar[:-1]).all())
        if not falls or (float(alpha_bar[-1]) == 0 and not self.config.rescale_betas_zero_snr):
            remedy = (
                "ā_t must fall at every step, from below 1 to above 0, or to 0 with rescale_betas_zero_snr; "
                "check beta_start, beta_end and trained_betas"
            )
            raise InputError("betas", [float(beta) for beta in self._forward_process.betas[[0, -1]]], remedy)

    def _check_terminal_weights(self) -> None:
        for name in self._weights:
            terminal = float(self.cumulative_weights(name)[-1].detach())
            if terminal > MAX_TERMINAL_WEIGHT and not self.config.allow_nonzero_terminal:
                remedy = (
                    f"W_T = {terminal:.3g} > {MAX_TERMINAL_WEIGHT}, so z_T would not be N(0, I), from which sampling "
                    "starts; take beta_schedule squaredcos_cap_v2, a smaller scale, the schedule bump, or "
                    "allow_nonzero_terminal=True"
                )
                raise InputError(f"weights.{name}", dict(self.config.weights[name]), remedy)

    # ---------------------------------------------------------------------------------------------------- the path

    def _timesteps_at(self, share: Tensor) -> Tensor:
        return (share * len(self)).long()

    def _factors(self, timesteps: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        """From ā_t rounded to the dtype first, as in the solvers, so that they return a clipped z_0 unchanged."""
        alpha_bar = self._at("a_bar", timesteps, like).to(like.dtype)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def _training_factors(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(s_t, σ_t) by diffusers' own arithmetic, as of `DDPMScheduler.add_noise`, for whole ``timesteps``."""
        key = "training", like.dtype, like.device
        tables = self._once(key, lambda: self._training_tables(like))
        signal, sigma = (table[timesteps].reshape(-1, *(1,) * (like.ndim - 1)) for table in tables)
        return signal, sigma

    def _training_tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self._forward_process.alphas_cumprod.to(like.device, like.dtype)
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5

    # ---------------------------------------------------------------------------------------------------- sampling

    def _place_steps(self, num_inference_steps: int, index: int) -> Tensor:
        solver, multistep = self._solver, self._traits.multistep
        solver.set_timesteps(num_inference_steps, device="cpu")
        trim_timesteps(solver, num_inference_steps, multistep)
        if self.config.literal_alpha and float(solver.alphas_cumprod[solver.timesteps].min()) == 0.0:
            remedy = f"ā_t underflows within T = {len(self)} steps; sample with a smaller T"
            raise InputError("literal_alpha", True, remedy)
        if multistep:
            solver.set_begin_index(index)
        return solver.timesteps

    def _step_arguments(self, timestep: float) -> dict[str, Any]:
        if self._eta == 0:
            return {}
        key = "eta", timestep, self.num_inference_steps
        return {"eta": self._once(key, lambda: safe_eta(self._solver, self._eta, timestep))}
