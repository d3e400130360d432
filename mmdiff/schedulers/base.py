"""The schedulers' common part: training targets and timesteps, and reversal through the shift u_t = z_t − c_t.

By Eq. (11) and (13) u_t is an ordinary process of z_0, so a solver of diffusers can reverse it: subtract c at the
current timestep, take the solver's step, add c at the next timestep. docs/theory.md, section 5, says which solvers
allow encodings that change from step to step.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.schedulers.arguments import plain_arguments
from mmdiff.schedulers.path import Encodings, GaussianPath
from mmdiff.schedulers.predictions import PREDICTIONS
from mmdiff.schedulers.solvers import Solver, check_options
from mmdiff.schedulers.weights import checked_weight
from mmdiff.trust import damage
from mmdiff.values import check_names, dense, plain, switch, whole

TIMESTEP_SAMPLING = {  # uniform numbers -> shares of the path, (B,) float64; logit_normal by Esser et al. (2024)
    "uniform": lambda u, mean, std: u,
    "logit_normal": lambda u, mean, std: torch.sigmoid(mean + std * torch.special.ndtri(u)),
}
_EDGE = 2.0**-25  # half a step of the 24-bit uniform numbers of mmdiff.randomness


@dataclass
class MTDiffusionSchedulerOutput(BaseOutput):
    """``prev_sample`` is z at the next timestep, ``pred_original_sample`` the predicted z_0; both (B, C, H, W)."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class MTScheduler(GaussianPath):
    """Base of the schedulers. A subclass registers its config, calls `_prepare`, then sets its path and its solver.

    It defines how timesteps count and where the solver's steps lie.
    """

    order = 1
    init_noise_sigma = 1.0
    solvers: ClassVar[Mapping[str, Solver]]
    refused: ClassVar[Mapping[str, str]]  # {solver: reason}
    prediction_types: ClassVar[tuple[str, ...]]

    config: Any
    timesteps: Tensor

    @classmethod
    def from_config(cls, config: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As of diffusers, but unknown arguments are refused.

        Raises:
            InputError: with the nearest name, and for a config that is no mapping: diffusers would ask the hub.
        """
        if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
            raise InputError("config", config, "needs the config of a scheduler; from_pretrained reads a folder")
        check_names(kwargs, list(inspect.signature(cls.__init__).parameters)[1:])
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, **kwargs: Any) -> Any:
        """As of diffusers; a damaged folder is an `InputError`."""
        with damage("scheduler", pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def _prepare(self, **copied: Any) -> dict[str, dict[str, Any]]:
        """Check the config. Returns the checked weights.

        Args:
            copied: mutable arguments, of which diffusers would keep the caller's own objects.
        """
        # else diffusers treats positional arguments as defaults, which `from_config` leaves out
        self.register_to_config(**copy.deepcopy(copied), _use_default_values=[])
        self.register_to_config(**plain_arguments(self.config))
        config = self.config
        self._check_choice("prediction_type", self.prediction_types)
        self._check_choice("timestep_sampling", tuple(TIMESTEP_SAMPLING))
        if config.solver not in self.solvers:
            reason = self.refused.get(config.solver, "is not known to be right under the shift u_t = z_t − c_t")
            raise InputError("solver", config.solver, f"{reason}; choose one of {', '.join(self.solvers)}")
        check_options(self._traits, config.solver_config or {})
        self.num_inference_steps: int | None = None
        self._step_index: int | None = None
        return {name: checked_weight(name, config.weights[name]) for name in sorted(config.weights or {})}

    def _check_choice(self, key: str, allowed: tuple[str, ...]) -> None:
        if self.config[key] not in allowed:
            raise InputError(key, self.config[key], f"choose one of {', '.join(allowed)}")

    @property
    def _traits(self) -> Solver:
        return self.solvers[self.config.solver]

    @property
    def is_stochastic(self) -> bool:
        """Whether the solver adds noise in its steps."""
        return self._traits.is_stochastic(self.config.solver_config or {})

    # ------------------------------------------------------------------------------------------------------ training

    def training_timesteps(self, u: Tensor) -> Tensor:
        """Timesteps to train at, by `timestep_sampling`: monotone in ``u`` (B,), uniform numbers in [0, 1)."""
        sampling = TIMESTEP_SAMPLING[self.config.timestep_sampling]
        u = u.double().clamp(_EDGE, 1 - _EDGE)
        return self._timesteps_at(self._shifted(sampling(u, self.config.logit_mean, self.config.logit_std)))

    def _shifted(self, share: Tensor) -> Tensor:
        """Shares of the path at which training happens, moved towards the noise where a path allows it."""
        return share

    def _timesteps_at(self, share: Tensor) -> Tensor:
        """Timesteps at shares of the path in (0, 1), (B,) float64."""
        raise NotImplementedError

    def add_noise(
        self, original_samples: Tensor, noise: Tensor, timesteps: Tensor, encodings: Encodings | None = None
    ) -> Tensor:
        """z_t of Eq. (2) and (11) at ``timesteps`` (B,), (B, C, H, W)."""
        signal, sigma = self._training_factors(timesteps, original_samples)
        u_t = signal * original_samples + sigma * noise
        return u_t + self.aggregate(encodings, timesteps, u_t) if encodings else u_t

    def training_target(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The network's target for u_t, by `prediction_type`; (B, C, H, W)."""
        coefficients = self._training_factors(timesteps, original_samples)
        return PREDICTIONS[self.config.prediction_type].target(original_samples, noise, *coefficients)

    def _training_factors(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(s_t, σ_t) of training at ``timesteps`` (B,), in the dtype of ``like``."""
        return self._factors(timesteps, like)

    def predict_original_sample(
        self, model_output: Tensor, timesteps: Tensor | float, sample: Tensor, encodings: Encodings | None = None
    ) -> Tensor:
        """The predicted z_0 from the network's output and z_t; (B, C, H, W), not clipped."""
        u_t = sample - self.aggregate(encodings, timesteps, sample) if encodings else sample
        coefficients = self._coefficients(timesteps, sample)
        return PREDICTIONS[self.config.prediction_type].original(model_output, u_t, *coefficients)

    def signal_and_noise(self, timestep: float) -> tuple[float, float]:
        """(s_t, σ_t) as Python numbers."""
        signal, noise = (float(self._at(key, timestep, self.path.signal)) for key in ("signal", "noise"))
        return signal, noise

    def shifted_prediction(self, model_output: Tensor, timestep: float, shift: Tensor) -> Tensor:
        """The model output whose predicted z_0 is shifted by ``shift`` (B, C, H, W)."""
        nothing = torch.zeros((), dtype=shift.dtype, device=shift.device)
        moved = PREDICTIONS[self.config.prediction_type].output(shift, nothing, *self.signal_and_noise(timestep))
        return model_output + moved  # outputs are linear in (z_0, u_t)

    def _coefficients(self, timesteps: Tensor | float, like: Tensor) -> tuple[Any, Any]:
        """(s_t, σ_t) in the dtype of ``like``; for a Python timestep numbers, which are cached."""
        if isinstance(timesteps, Tensor):
            return self._factors(timesteps, like)
        key = "signal, noise", timesteps, like.dtype
        return self._once(key, lambda: tuple(map(float, self._factors(timesteps, like))))

    def _factors(self, timesteps: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        """(s_t, σ_t) in the dtype of ``like``."""
        return self._at("signal", timesteps, like).to(like.dtype), self._at("noise", timesteps, like).to(like.dtype)

    # ------------------------------------------------------------------------------------------------------ sampling

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None, constant_encodings: bool = False
    ) -> None:
        """Set the timesteps of a sampling run and reset the solver.

        Args:
            num_inference_steps: solver steps, 1 … T.
            device: of ``timesteps``.
            constant_encodings: whether every `step` gets the same encodings. Only then a corrector may run that re-uses
                an earlier sample (UniPC's).
        """
        total = len(self)
        num_inference_steps = whole("num_inference_steps", num_inference_steps, 1)
        constant_encodings = switch("constant_encodings", constant_encodings)
        if not 1 <= num_inference_steps <= total:
            raise InputError("num_inference_steps", num_inference_steps, f"needs 1 … num_train_timesteps = {total}")
        timesteps = self._place_steps(num_inference_steps, 0)
        if self._traits.has_corrector:
            fixed = (self.config.solver_config or {}).get("disable_corrector", [])
            self._solver.disable_corrector = list(fixed) if constant_encodings else list(range(num_inference_steps))
        self.timesteps = timesteps.to(device)
        self.num_inference_steps = len(self.timesteps)
        self._step_index = 0
        self._steps = [*timesteps.tolist(), self.first_timestep - 1]  # the last is t = 0, where c = 0

    def _place_steps(self, num_inference_steps: int, index: int) -> Tensor:
        """Reset the solver to step number ``index``. Returns our timesteps (steps,), on the CPU so that `step` needs no
        synchronisation."""
        raise NotImplementedError

    @property
    def steps(self) -> list[Any]:
        """The timesteps of the run as Python numbers; the last one stands for t = 0."""
        return self._steps

    def rewind(self, count: int) -> None:
        """Go ``count`` steps back; the solver forgets all earlier steps."""
        count = whole("count", count, 0)
        if self._step_index is None or count > self._step_index:
            raise InputError("count", count, f"{self._step_index or 0} steps are taken")
        self._step_index -= count
        self._place_steps(self.num_inference_steps, self._step_index)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The sample itself; part of diffusers' interface."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        encodings: Encodings | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> MTDiffusionSchedulerOutput | tuple[Tensor, Tensor]:
        """One reverse step: u = z − c_t, a step of the solver on u, z = u + c_s with the same encodings.

        Args:
            model_output: the network's prediction at z_t, (B, C, H, W).
            timestep: ``timesteps[j]`` in call number j after `set_timesteps`.
            sample: z_t.
            encodings: of every aggregated modality, observed or predicted by its head.
            generator: for stochastic solvers; one, or one per sample.
        """
        if self._step_index is None:
            raise InputError("timestep", timestep, "call set_timesteps(num_inference_steps) before step")
        self._check_step(timestep)
        now, then = self._steps[self._step_index], self._steps[self._step_index + 1]
        u = sample - self.aggregate(encodings, now, sample) if encodings else sample
        original = self.predict_original_sample(model_output, now, u)
        if self.config.clip_sample:
            original = original.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if self.config.clip_sample or self._solver_prediction != self.config.prediction_type:
            model_output = PREDICTIONS[self._solver_prediction].output(original, u, *self._coefficients(now, u))
        u = self.solver_step(model_output, now, u, generator)
        previous = u + self.aggregate(encodings, then, u) if encodings else u
        if not return_dict:
            return previous, original
        return MTDiffusionSchedulerOutput(prev_sample=previous, pred_original_sample=original)

    def solver_step(
        self,
        model_output: Tensor,
        timestep: float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """The step of the diffusers class alone, on u_t; arguments as of `step`, ``timestep`` one of ``steps``."""
        arguments = self._step_arguments(timestep)
        if self._traits.takes_generator:
            arguments["generator"] = generator
        time = self._solver.timesteps[self._step_index]
        self._step_index += 1
        return self._solver.step(model_output, time, sample, return_dict=False, **arguments)[0]

    @property
    def _solver_prediction(self) -> str:
        """The prediction type of the solver; the network's output is converted to it."""
        return self.config.prediction_type

    def _step_arguments(self, timestep: float) -> dict[str, Any]:
        """Further arguments of the solver's step."""
        return {}

    def _check_step(self, timestep: Tensor | float) -> None:
        if self._step_index >= self.num_inference_steps:
            raise InputError("timestep", timestep, "all steps are taken; call set_timesteps for another run")
        if isinstance(timestep, Tensor):
            timestep = dense("timestep", timestep).squeeze()
            if timestep.device.type != "cpu":  # to read it would wait for the accelerator
                return
        expected, timestep = self._steps[self._step_index], plain("timestep", timestep)
        if not isinstance(timestep, int | float) or timestep != expected:
            raise InputError("timestep", timestep, f"call {self._step_index} after set_timesteps expects {expected}")
