"""The modality-weighted forward process and its reversal through the shift u_t = z_t − c_t, Eq. (1)–(6).

By Eq. (2) and (5) u_t is an ordinary diffusion of z_0, so any variance-preserving solver of diffusers reverses it:
subtract c at the current timestep, let the solver step, add c at the next one. The README (Theory, section 5) says
which solvers allow that when encodings change from call to call.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.likelihoods import Gaussian
from mmdiff.schedulers import weights as weight_schedules
from mmdiff.schedulers.solvers import REFUSED, SOLVERS, safe_eta, trim_timesteps

Encodings = Mapping[str, Tensor]  # {modality name: encoding in diffusion space, (B, C, H, W)}

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("v_prediction", "epsilon", "sample")
MAX_TERMINAL_WEIGHT = 0.1


@dataclass
class MTDiffusionSchedulerOutput(BaseOutput):
    """``prev_sample`` is z at the next timestep, ``pred_original_sample`` the predicted z_0; both (B, C, H, W)."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class MTDiffusionScheduler(SchedulerMixin, ConfigMixin):
    """Forward process, training targets and reverse steps of the modality-weighted diffusion.

    Timesteps count 0 … T − 1 as in diffusers; index k is t = k + 1 in the equations. Tables are float64.

    Args:
        num_train_timesteps: T.
        beta_schedule: "squaredcos_cap_v2", "linear" or "scaled_linear", as in diffusers, with its `beta_start`,
            `beta_end`, `trained_betas` and `rescale_betas_zero_snr`.
        prediction_type: "v_prediction", "epsilon" or "sample": what the network predicts of u_t.
        timestep_spacing: "trailing", "leading" or "linspace".
        clip_sample: clip the predicted z_0 to ±`clip_sample_range` in every step, for every solver; off for latents.
        weights: {modality: {"schedule": name, "scale": peak of W_t}}; schedules: constant, bump, early, none,
            learned (with "parameters" and "log_scale", see `mmdiff.schedulers.weights`).
        solver: name of one of `SOLVERS`; `solver_config` holds its own options (DDIM's `eta` included).
        literal_alpha: read α_t/(N + 1) literally, dividing a standard schedule by N + 1; for study, warns.
        allow_nonzero_terminal: accept W_T > 0.1, with which z_T is not N(0, I).

    Raises:
        InputError: on an unknown or refused choice; the message names the argument, the value and the remedy.
    """

    order = 1
    init_noise_sigma = 1.0

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
    ) -> None:
        # diffusers keeps the caller's own objects in the config: copy what can be changed from outside
        self.register_to_config(
            weights=copy.deepcopy(weights),
            solver_config=copy.deepcopy(solver_config),
            trained_betas=copy.deepcopy(trained_betas),
        )
        self._check_choices()
        self._arguments = self._base_arguments()
        self._forward_process = self._build_forward_process()
        self._solver = self._build_solver()
        self._set_tables()
        self.set_learned_weights(
            {
                name: (torch.tensor(entry["parameters"]), torch.tensor(entry.get("log_scale", 0.0)))
                for name, entry in self._weights.items()
                if entry["schedule"] == "learned"
            }
        )
        self._check_terminal_weights()
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self.num_inference_steps: int | None = None
        self._step_index: int | None = None

    # ------------------------------------------------------------------------------------------------ construction

    def _check_choices(self) -> None:
        config = self.config
        for key, allowed in (
            ("beta_schedule", BETA_SCHEDULES),
            ("prediction_type", PREDICTION_TYPES),
            ("timestep_spacing", ("trailing", "leading", "linspace")),
        ):
            if config[key] not in allowed:
                raise InputError(key, config[key], f"choose one of {', '.join(allowed)}")
        if config.solver not in SOLVERS:
            reason = REFUSED.get(config.solver, "is not known to be right under the shift u_t = z_t − c_t")
            raise InputError("solver", config.solver, f"{reason}; choose one of {', '.join(SOLVERS)}")
        if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
            raise InputError(
                "prediction_type", "epsilon", "at zero terminal SNR the noise says nothing of z_0; use v_prediction"
            )
        if config.rescale_betas_zero_snr and not SOLVERS[config.solver].zero_terminal_snr:
            raise InputError("solver", config.solver, "divides by √ā_T; with rescale_betas_zero_snr use another solver")
        if config.trained_betas is not None and len(config.trained_betas) != config.num_train_timesteps:
            raise InputError("trained_betas", len(config.trained_betas), "needs num_train_timesteps entries")
        options = SOLVERS[config.solver].options
        for key in config.solver_config or {}:
            if key not in options:
                raise InputError(f"solver_config.{key}", config.solver_config[key], f"choose from {', '.join(options)}")
        self._weights = {}
        for name in sorted(config.weights or {}):
            self._weights[name] = _checked_weight(name, config.weights[name])

    def _base_arguments(self) -> dict[str, Any]:
        """The arguments that fix the betas, the same for every diffusers class."""
        config = self.config
        arguments = {
            "num_train_timesteps": config.num_train_timesteps,
            "beta_schedule": config.beta_schedule,
            "beta_start": config.beta_start,
            "beta_end": config.beta_end,
            "trained_betas": config.trained_betas,
            "prediction_type": config.prediction_type,
            "timestep_spacing": config.timestep_spacing,
        }
        if config.literal_alpha:
            arguments["trained_betas"] = self._literal_betas(arguments)
        return arguments

    def _literal_betas(self, arguments: dict[str, Any]) -> list[float]:
        """1 − (1 − β_t)/(N + 1): what dividing a standard schedule by N + 1 does to the betas."""
        standard = 1.0 - DDPMScheduler(**arguments, clip_sample=False).betas.double()
        alphas = standard / (len(self._weights) + 1)
        lost = int((alphas.cumprod(0) >= 1e-3).sum()) + 1
        warnings.warn(
            f"literal_alpha=True divides the schedule by N + 1 = {len(self._weights) + 1}: ā_t < 1e-3 after {lost} of "
            f"{self.config.num_train_timesteps} steps, the anchor is destroyed; for study only",
            stacklevel=4,
        )
        return (1.0 - alphas).tolist()

    def _build_forward_process(self) -> DDPMScheduler:
        """Noise and targets for training: DDPM's arithmetic (DDIM's is the same; multistep solvers only look a
        timestep up among those of the last `set_timesteps`)."""
        return DDPMScheduler(
            **self._arguments, rescale_betas_zero_snr=self.config.rescale_betas_zero_snr, clip_sample=False
        )

    def _build_solver(self) -> SchedulerMixin:
        traits = SOLVERS[self.config.solver]
        arguments = {**self._arguments, **(self.config.solver_config or {})}
        self._eta = arguments.pop("eta", 0.0)
        if self.config.rescale_betas_zero_snr:
            arguments["rescale_betas_zero_snr"] = True
        if not traits.multistep:
            arguments["clip_sample"] = False  # the wrapper clips, on z_0, for every solver alike
        return traits.scheduler(**arguments)

    def _set_tables(self) -> None:
        self.alphas = 1.0 - self._forward_process.betas.double()
        self.alphas_cumprod = self.alphas.cumprod(0)
        self._cumulative: dict[str, Tensor] = {}
        self._tables = {"a": _from_zero(self.alphas, 1.0), "a_bar": _from_zero(self.alphas_cumprod, 1.0)}
        self._tables_on: dict[tuple[str, torch.device], Tensor] = {}
        self._numbers: dict[tuple[int, torch.dtype], tuple[float, float]] = {}
        for name, entry in self._weights.items():
            if entry["schedule"] != "learned":
                table = weight_schedules.cumulative_weights(self.alphas, entry["schedule"], entry["scale"])
                self._set_weights(name, table)

    def _set_weights(self, name: str, cumulative: Tensor) -> None:
        self._cumulative[name] = cumulative
        self._tables[f"W/{name}"] = _from_zero(cumulative, 0.0)
        self._tables[f"w/{name}"] = _from_zero(weight_schedules.step_weights(self.alphas, cumulative), 0.0)
        self._tables_on = {key: table for key, table in self._tables_on.items() if not key[0].endswith(f"/{name}")}

    def _check_terminal_weights(self) -> None:
        for name in self._weights:
            terminal = float(self.cumulative_weights(name)[-1].detach())
            if terminal > MAX_TERMINAL_WEIGHT and not self.config.allow_nonzero_terminal:
                raise InputError(
                    f"weights.{name}",
                    dict(self.config.weights[name]),
                    f"W_T = {terminal:.3g} > {MAX_TERMINAL_WEIGHT}, so z_T would not be N(0, I) and sampling would "
                    "start from the wrong law; take beta_schedule squaredcos_cap_v2, a smaller scale, the schedule "
                    "bump, or allow_nonzero_terminal=True",
                )

    def set_learned_weights(self, learned: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Replace W_t of learned schedules by the table of live parameters, through which gradients flow.

        Args:
            learned: {modality: (parameters (LEARNED_NODES,), log_scale ())}.
        """
        for name, (parameters, log_scale) in learned.items():
            scale = self._weights[name]["scale"]
            self._set_weights(
                name, weight_schedules.cumulative_weights(self.alphas, "learned", scale, parameters, log_scale)
            )

    # -------------------------------------------------------------------------------------------------- coefficients

    @property
    def is_stochastic(self) -> bool:
        """Whether the solver draws noise in its steps (theory: then unknown modalities are drawn too)."""
        return SOLVERS[self.config.solver].is_stochastic(self.config.solver_config or {})

    def cumulative_weights(self, name: str) -> Tensor:
        """W_t of a modality, (T,) float64, Eq. (3)."""
        if name not in self._cumulative:
            raise InputError(
                "encodings", name, f"has no weights; weights has {', '.join(self._cumulative) or 'nothing'}"
            )
        return self._cumulative[name]

    def step_weights(self, name: str) -> Tensor:
        """w_t of a modality inside one transition, (T,) float64, Eq. (3)."""
        return weight_schedules.step_weights(self.alphas, self.cumulative_weights(name))

    def _at(self, key: str, timesteps: Tensor | int, like: Tensor) -> Tensor:
        """A table at timesteps: (B, 1, 1, 1) float64 on the device of ``like``, or a scalar for a Python int.

        Tables count t as the equations do, so that timestep −1 is t = 0. Fractional timesteps are interpolated.
        """
        if isinstance(timesteps, int):
            return self._tables[key][timesteps + 1]
        device = like.device
        if (key, device) not in self._tables_on:
            self._tables_on[key, device] = self._tables[key].to(device)
        table, t = self._tables_on[key, device], timesteps.to(device) + 1
        if t.is_floating_point():
            left = t.floor().long().clamp(max=len(table) - 2)
            values = torch.lerp(table[left], table[left + 1], (t - left).to(table.dtype))
        else:
            values = table[t.long()]
        return values.reshape(-1, *(1,) * (like.ndim - 1))

    def aggregate(self, encodings: Encodings | None, timesteps: Tensor | int, like: Tensor) -> Tensor:
        """c_t = Σ_i W_t^(i) E_i(x_i), broadcastable to ``like``; timestep −1 gives c_0 = 0."""
        return self._weighted_sum("W", encodings, timesteps, like)

    def _weighted_sum(self, kind: str, encodings: Encodings | None, timesteps: Tensor | int, like: Tensor) -> Tensor:
        parts = []
        for name in sorted(encodings or {}):
            self.cumulative_weights(name)  # a modality without weights is refused by name
            weight = self._at(f"{kind}/{name}", timesteps, like)
            # a number costs no tensor operation, and a scalar of the CPU multiplies any device's tensor
            scale = float(weight) if isinstance(timesteps, int) else weight.to(encodings[name].dtype)
            parts.append(scale * encodings[name])
        return sum(parts[1:], parts[0]) if parts else torch.zeros((), dtype=like.dtype, device=like.device)

    # ------------------------------------------------------------------------------------- the equations, in float64

    def transition(self, previous_sample: Tensor, timesteps: Tensor, encodings: Encodings | None = None) -> Gaussian:
        """q(z_t | z_{t−1}, X), Eq. (1). ``timesteps`` (B,) are the indices of t."""
        alpha = self._at("a", timesteps, previous_sample)
        shift = self._weighted_sum("w", encodings, timesteps, previous_sample)
        return Gaussian(alpha.sqrt() * (previous_sample + shift), 1 - alpha)

    def marginal(self, original_samples: Tensor, timesteps: Tensor, encodings: Encodings | None = None) -> Gaussian:
        """q(z_t | z_0, X), Eq. (2)."""
        alpha_bar = self._at("a_bar", timesteps, original_samples)
        c_t = self.aggregate(encodings, timesteps, original_samples)
        return Gaussian(alpha_bar.sqrt() * original_samples + c_t, 1 - alpha_bar)

    def posterior(
        self, original_samples: Tensor, sample: Tensor, timesteps: Tensor, encodings: Encodings | None = None
    ) -> Gaussian:
        """q(z_{t−1} | z_t, z_0, X), Eq. (4) and (5). At t = 1 it is the point z_0."""
        alpha, alpha_bar = self._at("a", timesteps, sample), self._at("a_bar", timesteps, sample)
        previous = self._at("a_bar", timesteps - 1, sample)
        c_t = self.aggregate(encodings, timesteps, sample)
        c_s = self.aggregate(encodings, timesteps - 1, sample)
        mean = (
            c_s
            + previous.sqrt() * (1 - alpha) / (1 - alpha_bar) * original_samples
            + alpha.sqrt() * (1 - previous) / (1 - alpha_bar) * (sample - c_t)
        )
        return Gaussian(mean, (1 - alpha) * (1 - previous) / (1 - alpha_bar))

    def posterior_from_noise(
        self, noise: Tensor, sample: Tensor, timesteps: Tensor, encodings: Encodings | None = None
    ) -> Gaussian:
        """q(z_{t−1} | z_t, z_0, X) with its mean from the noise, Eq. (4) and (6); needs a_t > 0."""
        alpha, alpha_bar = self._at("a", timesteps, sample), self._at("a_bar", timesteps, sample)
        previous = self._at("a_bar", timesteps - 1, sample)
        e_t = self._weighted_sum("w", encodings, timesteps, sample)
        mean = (sample - (1 - alpha) / (1 - alpha_bar).sqrt() * noise) / alpha.sqrt() - e_t
        return Gaussian(mean, (1 - alpha) * (1 - previous) / (1 - alpha_bar))

    # ------------------------------------------------------------------------------------------------------ training

    def add_noise(
        self, original_samples: Tensor, noise: Tensor, timesteps: Tensor, encodings: Encodings | None = None
    ) -> Tensor:
        """z_t of Eq. (2) for integer ``timesteps`` (B,): diffusers' own u_t plus c_t, (B, C, H, W)."""
        u_t = self._forward_process.add_noise(original_samples, noise, timesteps)
        return u_t + self.aggregate(encodings, timesteps, u_t) if encodings else u_t

    def training_target(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict: v, the noise or z_0 of u_t, by `prediction_type`; (B, C, H, W)."""
        if self.config.prediction_type == "v_prediction":
            return self._forward_process.get_velocity(original_samples, noise, timesteps)
        return noise if self.config.prediction_type == "epsilon" else original_samples

    def predict_original_sample(
        self, model_output: Tensor, timesteps: Tensor, sample: Tensor, encodings: Encodings | None = None
    ) -> Tensor:
        """The prediction of z_0 that ``model_output`` stands for, from z_t; (B, C, H, W), not clipped."""
        u_t = sample - self.aggregate(encodings, timesteps, sample) if encodings else sample
        root, sigma = self._factors(timesteps, sample)
        if self.config.prediction_type == "v_prediction":
            return root * u_t - sigma * model_output
        return (u_t - sigma * model_output) / root if self.config.prediction_type == "epsilon" else model_output

    def signal_and_noise(self, timestep: int) -> tuple[float, float]:
        """(√ā_t, √(1 − ā_t)), the factors of z_0 and of the noise in z_t; timestep −1 is t = 0."""
        alpha_bar = float(self._tables["a_bar"][timestep + 1])
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)

    def _factors(self, timesteps: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """√ā_t and √(1 − ā_t) in the precision of ``like``, as diffusers has them; numbers for a Python int."""
        if isinstance(timesteps, int) and (timesteps, like.dtype) in self._numbers:
            return self._numbers[timesteps, like.dtype]
        alpha_bar = self._at("a_bar", timesteps, like).to(like.dtype)
        root, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if not isinstance(timesteps, int):
            return root, sigma
        return self._numbers.setdefault((timesteps, like.dtype), (float(root), float(sigma)))

    def shifted_prediction(self, model_output: Tensor, timestep: int, shift: Tensor) -> Tensor:
        """The model output that stands for a predicted z_0 moved by ``shift`` (B, C, H, W)."""
        signal, noise = self.signal_and_noise(timestep)
        if self.config.prediction_type == "sample":
            return model_output + shift
        by = 1 / noise if self.config.prediction_type == "v_prediction" else signal / noise
        return model_output - by * shift

    # ------------------------------------------------------------------------------------------------------ sampling

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None, changing_encodings: bool = False
    ) -> None:
        """Choose the timesteps of a sampling run and forget the last one.

        Args:
            num_inference_steps: solver steps, 1 … T.
            device: where ``timesteps`` will live.
            changing_encodings: whether an unknown modality is aggregated, so that encodings change from call to call;
                UniPC's corrector, which re-uses an earlier sample, is then off.
        """
        total = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total:
            raise InputError("num_inference_steps", num_inference_steps, f"needs 1 … num_train_timesteps = {total}")
        self._start_solver(num_inference_steps, 0)
        if self.config.literal_alpha and float(self._solver.alphas_cumprod[self._solver.timesteps].min()) == 0.0:
            raise InputError("literal_alpha", True, f"ā_t underflows within T = {total} steps; sample with a smaller T")
        if SOLVERS[self.config.solver].has_corrector:
            fixed = (self.config.solver_config or {}).get("disable_corrector", [])
            self._solver.disable_corrector = list(range(num_inference_steps)) if changing_encodings else list(fixed)
        self.timesteps = self._solver.timesteps.to(device)
        self.num_inference_steps = len(self.timesteps)
        self._step_index = 0
        self._steps = [*self._solver.timesteps.tolist(), -1]  # −1 is t = 0, where c = 0

    def _start_solver(self, num_inference_steps: int, index: int) -> None:
        """The solver before step number ``index``, with nothing kept from earlier steps."""
        multistep = SOLVERS[self.config.solver].multistep
        self._solver.set_timesteps(num_inference_steps, device="cpu")  # stays here: no host synchronisation in `step`
        trim_timesteps(self._solver, num_inference_steps, multistep)
        if multistep:
            self._solver.set_begin_index(index)

    @property
    def steps(self) -> list[int]:
        """The timesteps of the run as Python numbers, and −1, which is t = 0, at the end."""
        return self._steps

    def rewind(self, count: int) -> None:
        """Go ``count`` steps back: the last of them are taken again, by a solver that has forgotten them."""
        if self._step_index is None or not 0 <= count <= self._step_index:
            raise InputError("count", count, f"{self._step_index or 0} steps are taken")
        self._step_index -= count
        self._start_solver(self.num_inference_steps, self._step_index)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """The sample itself: variance-preserving solvers scale nothing."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
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
            encodings: of every aggregated modality, known or read from its head at this call.
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
            model_output = self._prediction_of(original, now, u)
        arguments: dict[str, Any] = {"generator": generator} if SOLVERS[self.config.solver].takes_generator else {}
        if self._eta > 0:
            arguments["eta"] = safe_eta(self._solver, self._eta, now)
        timestep = self._solver.timesteps[self._step_index]
        u = self._solver.step(model_output, timestep, u, return_dict=False, **arguments)[0]
        previous = u + self.aggregate(encodings, then, u) if encodings else u
        self._step_index += 1
        if not return_dict:
            return previous, original
        return MTDiffusionSchedulerOutput(prev_sample=previous, pred_original_sample=original)

    def _check_step(self, timestep: Tensor | int) -> None:
        if self._step_index >= self.num_inference_steps:
            raise InputError("timestep", timestep, "all steps are taken; call set_timesteps for another run")
        known = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"  # never wait for an accelerator
        if known and int(timestep) != self._steps[self._step_index]:
            raise InputError(
                "timestep",
                int(timestep),
                f"call {self._step_index} after set_timesteps expects {self._steps[self._step_index]}",
            )

    def _prediction_of(self, original: Tensor, timestep: int, u_t: Tensor) -> Tensor:
        """The model output that stands for a given z_0: the inverse of `predict_original_sample`."""
        root, sigma = self._factors(timestep, u_t)
        if self.config.prediction_type == "v_prediction":
            return (root * u_t - original) / sigma
        return (u_t - root * original) / sigma if self.config.prediction_type == "epsilon" else original

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _from_zero(table: Tensor, first: float) -> Tensor:
    """(T,) for t = 1 … T -> (T + 1,) for t = 0 … T."""
    return torch.cat([table.new_full((1,), first), table])


def _checked_weight(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of `weights` with its defaults filled in."""
    unknown = set(entry) - {"schedule", "scale", "parameters", "log_scale", "learn_scale"}
    if unknown:
        raise InputError(f"weights.{name}.{sorted(unknown)[0]}", entry[sorted(unknown)[0]], "unknown key")
    schedule, scale = entry.get("schedule", "constant"), entry.get("scale", weight_schedules.DEFAULT_SCALE)
    if schedule not in weight_schedules.SCHEDULES:
        raise InputError(f"weights.{name}.schedule", schedule, f"choose one of {', '.join(weight_schedules.SCHEDULES)}")
    if not scale >= 0:
        raise InputError(f"weights.{name}.scale", scale, "the peak of W_t is a number ≥ 0")
    checked = {**entry, "schedule": schedule, "scale": float(scale)}
    if schedule == "learned":
        checked.setdefault("parameters", weight_schedules.initial_parameters().tolist())
    return checked
