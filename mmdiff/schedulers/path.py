"""A Gaussian path z_t = s_t z_0 + c_t + σ_t ε: tables and distributions, Eq. (11)–(13); (1)–(6) are one case."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.likelihoods import Gaussian
from mmdiff.schedulers import weights as weight_schedules
from mmdiff.schedulers.weights import Coefficients

Encodings = Mapping[str, Tensor]  # {modality name: encoding in diffusion space, (B, C, H, W)}


class GaussianPath:
    """Base of a scheduler with the equations; a subclass calls `_set_path` first.

    ``path`` holds s_t, σ_t and ρ_t, (T,) float64; index k is t = k + 1. Timestep τ stands for t = τ − first_timestep
    + 1; between two steps s, σ and W are interpolated linearly.
    """

    first_timestep: int  # the timestep of t = 1
    path: Coefficients

    def _set_path(self, path: Coefficients, weights: Mapping[str, Mapping[str, Any]]) -> None:
        """Build the tables; ``weights`` are checked by `weight_schedules.checked_weight`."""
        self.path, self._weights = path, dict(weights)
        self._cumulative: dict[str, Tensor] = {}
        self._numbers: dict[tuple[Any, ...], Any] = {}  # cached results for Python timesteps
        self._tables = {
            "signal": Table(path.signal, 1.0),
            "noise": Table(path.noise, 0.0),
            "ratio": Table(path.ratio, 1.0),
        }
        for name, entry in self._weights.items():
            learned = ()
            if entry["schedule"] == "learned":
                if len(self) < 3:
                    raise InputError(f"weights.{name}.schedule", "learned", "needs num_train_timesteps of 3 at least")
                learned = torch.tensor(entry["parameters"]), torch.tensor(entry.get("log_scale", 0.0))
            self._set_weights(name, *learned)

    def _set_weights(self, name: str, *learned: Tensor) -> None:
        """Set W_t and w_t of a modality; ``learned`` are the parameters and the log of the scale."""
        entry = self._weights[name]
        cumulative = weight_schedules.cumulative_weights(self.path, entry["schedule"], entry["scale"], *learned)
        self._cumulative[name] = cumulative
        self._tables[f"W/{name}"] = Table(cumulative, 0.0)
        self._tables[f"w/{name}"] = Table(weight_schedules.step_weights(self.path, cumulative), 0.0)

    def with_learned_weights(self, learned: Mapping[str, tuple[Tensor, Tensor]]) -> Self:
        """The same forward process with W_t of learned schedules from parameters, through which gradients flow.

        Args:
            learned: {modality: (parameters (LEARNED_NODES,), log_scale ())}.
        """
        if not learned:
            return self
        process = copy.copy(self)  # it shares the tables of the path and the solver
        process._cumulative, process._tables, process._numbers = dict(self._cumulative), dict(self._tables), {}
        for name, parameters in learned.items():
            process._set_weights(name, *parameters)
        return process

    # -------------------------------------------------------------------------------------------------- coefficients

    def __len__(self) -> int:
        return len(self.path.signal)

    @property
    def terminal_timestep(self) -> int:
        """The timestep of t = T."""
        return self.first_timestep + len(self) - 1

    def share(self, timesteps: Tensor) -> Tensor:
        """t/T at ``timesteps`` (B,): float32 in (0, 1]."""
        return ((timesteps + (1 - self.first_timestep)) / len(self)).float()

    def cumulative_weights(self, name: str) -> Tensor:
        """W_t of a modality, (T,) float64, Eq. (3)."""
        if name not in self._cumulative:
            known = ", ".join(self._cumulative) or "nothing"
            raise InputError("encodings", name, f"has no weights; weights has {known}")
        return self._cumulative[name]

    def step_weights(self, name: str) -> Tensor:
        """w_t of a modality inside one transition, (T,) float64, Eq. (3)."""
        return weight_schedules.step_weights(self.path, self.cumulative_weights(name))

    def snr(self, timesteps: Tensor) -> Tensor:
        """s_t²/σ_t² at ``timesteps`` (B,): (B,) float64."""
        return (self._at("signal", timesteps, timesteps) / self._at("noise", timesteps, timesteps)) ** 2

    def _at(self, key: str, timesteps: Tensor | float, like: Tensor) -> Tensor:
        """A table at timesteps: (B, 1, 1, 1) float64 on the device of ``like``, or a scalar for a Python number."""
        t = timesteps + (1 - self.first_timestep)  # this order rounds no float32 timestep
        if not isinstance(t, Tensor):  # a CPU scalar multiplies any device's tensor without a transfer
            table = self._tables[key].values
            return table[t] if isinstance(t, int) else _between(table, torch.tensor(t, dtype=torch.float64))
        table, t = self._tables[key].on(like.device), t.to(like.device)
        values = _between(table, t) if t.is_floating_point() else table[t.long()]
        return values.reshape(-1, *(1,) * (like.ndim - 1))

    def aggregate(self, encodings: Encodings | None, timesteps: Tensor | float, like: Tensor) -> Tensor:
        """c_t = Σ_i W_t^(i) E_i(x_i), broadcastable to ``like``; c_0 = 0."""
        return self._weighted_sum("W", encodings, timesteps, like)

    def _weighted_sum(self, kind: str, encodings: Encodings | None, timesteps: Tensor | float, like: Tensor) -> Tensor:
        names = sorted(encodings or {})
        terms = [self._weight(kind, name, timesteps, encodings[name]) * encodings[name] for name in names]
        return sum(terms[1:], start=terms[0]) if terms else torch.zeros((), dtype=like.dtype, device=like.device)

    def _weight(self, kind: str, name: str, timesteps: Tensor | float, like: Tensor) -> Any:
        """W_t or w_t in the dtype of ``like``; a Python timestep gives a number."""
        self.cumulative_weights(name)  # refuses a modality without weights
        key = f"{kind}/{name}"
        if isinstance(timesteps, Tensor):
            return self._at(key, timesteps, like).to(like.dtype)
        return self._once((key, timesteps, like.dtype), lambda: self._at(key, timesteps, like).to(like.dtype).item())

    def _once(self, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        """``compute()``, cached: each number costs several tensor operations in every sampling step."""
        if key not in self._numbers:
            self._numbers[key] = compute()
        return self._numbers[key]

    def _step_variance(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """σ_t² − ρ_t² σ_{t−1}², the variance that one transition adds; 1 − a_t on the variance-preserving path."""
        kept = self._at("ratio", timesteps, like) * self._at("noise", timesteps - 1, like)
        return self._at("noise", timesteps, like) ** 2 - kept**2

    # -------------------------------------------------------------------------------------- the equations, in float64

    def transition(self, previous_sample: Tensor, timesteps: Tensor, encodings: Encodings | None = None) -> Gaussian:
        """q(z_t | z_{t−1}, X), Eq. (1) and (12). ``timesteps`` (B,) are those of t, whole numbers."""
        shift = self._weighted_sum("w", encodings, timesteps, previous_sample)
        ratio = self._at("ratio", timesteps, previous_sample)
        return Gaussian(ratio * (previous_sample + shift), self._step_variance(timesteps, previous_sample))

    def marginal(self, original_samples: Tensor, timesteps: Tensor, encodings: Encodings | None = None) -> Gaussian:
        """q(z_t | z_0, X), Eq. (2) and (11)."""
        c_t = self.aggregate(encodings, timesteps, original_samples)
        signal, noise = (self._at(key, timesteps, original_samples) for key in ("signal", "noise"))
        return Gaussian(signal * original_samples + c_t, noise**2)

    def posterior(
        self, original_samples: Tensor, sample: Tensor, timesteps: Tensor, encodings: Encodings | None = None
    ) -> Gaussian:
        """q(z_{t−1} | z_t, z_0, X), Eq. (4), (5) and (13); at t = 1 the point z_0."""
        added, before = self._step_variance(timesteps, sample), self._at("noise", timesteps - 1, sample) ** 2
        total = self._at("noise", timesteps, sample) ** 2
        c_t = self.aggregate(encodings, timesteps, sample)
        mean = (
            self.aggregate(encodings, timesteps - 1, sample)
            + self._at("signal", timesteps - 1, sample) * added / total * original_samples
            + self._at("ratio", timesteps, sample) * before / total * (sample - c_t)
        )
        return Gaussian(mean, added * before / total)

    def posterior_from_noise(
        self, noise: Tensor, sample: Tensor, timesteps: Tensor, encodings: Encodings | None = None
    ) -> Gaussian:
        """q(z_{t−1} | z_t, z_0, X) with the mean from the noise, Eq. (4) and (6); needs ρ_t > 0."""
        added, before = self._step_variance(timesteps, sample), self._at("noise", timesteps - 1, sample) ** 2
        sigma = self._at("noise", timesteps, sample)
        e_t = self._weighted_sum("w", encodings, timesteps, sample)
        mean = (sample - added / sigma * noise) / self._at("ratio", timesteps, sample) - e_t
        return Gaussian(mean, added * before / sigma**2)


class Table:
    """Values for t = 0 … T, with a copy per device.

    Args:
        table: (T,) for t = 1 … T.
        first: the value of t = 0.
    """

    def __init__(self, table: Tensor, first: float) -> None:
        self.values = torch.cat([table.new_full((1,), first), table])
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The values on a device, (T + 1,)."""
        if device not in self._copies:
            self._copies[device] = self.values.to(device)
        return self._copies[device]


def _between(table: Tensor, t: Tensor) -> Tensor:
    """A table at fractional t, by linear interpolation."""
    left = t.floor().long().clamp(max=len(table) - 2)
    return torch.lerp(table[left], table[left + 1], (t - left).to(table.dtype))
