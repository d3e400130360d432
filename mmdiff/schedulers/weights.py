"""Weight schedules: the share of a modality's encoding in the mean of q(z_t | z_0, X) (docs/theory.md, section 3).

A schedule is a shape g_t, t = 1 … T. The cumulative weight is W_t = scale · g_t / max_s g_s, so that ``scale`` is the
peak of W_t for every schedule. Everything is float64 and differentiable in the learned parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.schedulers.arguments import check_value

LEARNED_NODES = 16  # parameters of a learned schedule: increments of r on an even grid of log-SNR


class Coefficients(NamedTuple):
    """A Gaussian path z_t = s_t z_0 + c_t + σ_t ε, Eq. (11): (T,) float64 each, for t = 1 … T."""

    signal: Tensor  # s_t; √ā_t on the variance-preserving path
    noise: Tensor  # σ_t; √(1 − ā_t)
    ratio: Tensor  # ρ_t = s_t/s_{t−1}; √a_t


def constant(path: Coefficients) -> Tensor:
    """w_t = 1 in every transition; W_t = ρ_t (W_{t−1} + 1), Eq. (3). Late anchor, early modality."""
    total, shape = 0.0, []
    for ratio in path.ratio.tolist():
        total = ratio * (total + 1.0)
        shape.append(total)
    return torch.tensor(shape, dtype=torch.float64)


def bump(path: Coefficients) -> Tensor:
    """W_t ∝ s_t σ_t: zero at both ends."""
    return path.signal * path.noise


def early(path: Coefficients) -> Tensor:
    """W_t ∝ s_t for t ≥ 1: the ordinary diffusion of z_0 + λE."""
    return path.signal.clone()


def none(path: Coefficients) -> Tensor:
    """W_t = 0: the modality is never aggregated."""
    return torch.zeros_like(path.signal)


def learned(path: Coefficients, parameters: Tensor) -> Tensor:
    """g_t = s_t · r_t · √(1 − ā_T/ā_t), ā = s²/(s² + σ²), r non-decreasing from 0: cumulative softplus on log-SNR.

    Args:
        path: s_t and σ_t.
        parameters: (LEARNED_NODES,), the increments before softplus.
    """
    power = path.signal**2 / (path.signal**2 + path.noise**2)
    bounded = power.clamp(1e-9, 1 - 1e-9)
    log_snr = (bounded / (1 - bounded)).log()
    depth = (log_snr[0] - log_snr) / (log_snr[0] - log_snr[-2])  # 0 at t = 1, 1 at t = T − 1: W_T is 0 anyway
    increments = torch.nn.functional.softplus(parameters.to(torch.float64))
    nodes = torch.cat([torch.zeros(1, dtype=torch.float64, device=increments.device), increments.cumsum(0)])
    place = (depth.to(nodes.device) * (len(nodes) - 1)).clamp(0, len(nodes) - 1 - 1e-9)
    left = place.floor().long()
    r = torch.lerp(nodes[left], nodes[left + 1], place - left)
    vanish = (1 - power[-1] / power.clamp(min=1e-300)).clamp(min=0.0)
    return (path.signal * vanish.sqrt()).to(r.device) * r


def initial_parameters() -> Tensor:
    """Parameters for which r_t is linear in log-SNR: (LEARNED_NODES,) float32."""
    return torch.full((LEARNED_NODES,), math.log(math.expm1(1.0 / LEARNED_NODES)))


SHAPES = {"constant": constant, "bump": bump, "early": early, "none": none}
SCHEDULES = (*SHAPES, "learned")
DEFAULT_SCALE = 1.5
_NUMBER = Annotated[float, Field(strict=True, ge=-1e4, le=1e4)]
_ENTRIES = {  # {key of an entry of a scheduler's `weights`: its type}
    "schedule": Literal[SCHEDULES],
    "scale": Annotated[float, Field(strict=True, ge=0, le=1e4)],
    "parameters": Annotated[list[_NUMBER], Field(strict=True, min_length=1)],
    "log_scale": Annotated[float, Field(strict=True, ge=-100, le=100)],
    "learn_scale": Annotated[bool, Field(strict=True)],
}


def cumulative_weights(
    path: Coefficients,
    schedule: str,
    scale: float = DEFAULT_SCALE,
    parameters: Tensor | None = None,
    log_scale: Tensor | float = 0.0,
) -> Tensor:
    """W_t for t = 1 … T: (T,) float64, with max_t W_t = scale · exp(log_scale)."""
    shape = SHAPES[schedule](path) if parameters is None else learned(path, parameters)
    peak = shape.max().clamp(min=torch.finfo(torch.float64).tiny)
    gain = torch.as_tensor(log_scale, dtype=torch.float64, device=shape.device).exp()
    return scale * gain * shape / peak


def step_weights(path: Coefficients, cumulative: Tensor) -> Tensor:
    """w_t = W_t/ρ_t − W_{t−1}, Eq. (3) solved for w_t; w_t := 0 where ρ_t = 0."""
    before = torch.cat([cumulative.new_zeros(1), cumulative[:-1]])
    ratio = path.ratio.to(cumulative.device)
    return torch.where(ratio > 0, cumulative / ratio.clamp(min=1e-150) - before, 0.0)


def checked_weight(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of a scheduler's `weights`, with defaults.

    Raises:
        InputError: for an unknown key and a value of another type.
    """
    for key, value in entry.items():
        if key not in _ENTRIES:
            raise InputError(f"weights.{name}.{key}", value, f"unknown key; choose from {', '.join(_ENTRIES)}")
        check_value(f"weights.{name}.{key}", value, _ENTRIES[key])
    schedule, scale = entry.get("schedule", "constant"), entry.get("scale", DEFAULT_SCALE)
    checked = {**entry, "schedule": schedule, "scale": float(scale)}
    if schedule == "learned":
        checked.setdefault("parameters", initial_parameters().tolist())
    return checked
