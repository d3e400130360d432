"""Weight schedules: how much of a modality's encoding the mean of q(z_t | z_0, X) carries (README, Theory, section 3).

A schedule is a shape g_t, t = 1 … T; the cumulative weight is W_t = scale · g_t / max_s g_s, so that ``scale`` is the
peak of W_t whatever the schedule. Everything is float64 and differentiable in the learned parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEARNED_NODES = 16  # parameters of a learned schedule: increments of r on an even grid of log-SNR


def constant(alphas: Tensor) -> Tensor:
    """w_t = 1 in every transition; W_t = √a_t (W_{t−1} + 1), Eq. (3). Late anchor, early modality."""
    total, shape = 0.0, []
    for root in alphas.sqrt().tolist():
        total = root * (total + 1.0)
        shape.append(total)
    return torch.tensor(shape, dtype=torch.float64)


def bump(alphas: Tensor) -> Tensor:
    """W_t ∝ √ā_t (1 − ā_t)^½: zero at both ends."""
    alphas_cumprod = alphas.cumprod(0)
    return (alphas_cumprod * (1 - alphas_cumprod)).sqrt()


def early(alphas: Tensor) -> Tensor:
    """W_t ∝ √ā_t for t ≥ 1: the ordinary diffusion of z_0 + λE."""
    return alphas.cumprod(0).sqrt()


def none(alphas: Tensor) -> Tensor:
    """W_t = 0: the modality is decoded and never aggregated."""
    return torch.zeros_like(alphas)


def learned(alphas: Tensor, parameters: Tensor) -> Tensor:
    """g_t = √ā_t · r_t · √(1 − ā_T/ā_t), r non-decreasing from 0: cumulative softplus on a log-SNR grid.

    Args:
        alphas: (T,) float64.
        parameters: (LEARNED_NODES,), the increments before softplus.
    """
    alphas_cumprod = alphas.cumprod(0)
    bounded = alphas_cumprod.clamp(1e-9, 1 - 1e-9)
    log_snr = (bounded / (1 - bounded)).log()
    depth = (log_snr[0] - log_snr) / (log_snr[0] - log_snr[-2])  # 0 at t = 1, 1 at t = T − 1: W_T is 0 anyway
    increments = torch.nn.functional.softplus(parameters.to(torch.float64))
    nodes = torch.cat([torch.zeros(1, dtype=torch.float64, device=increments.device), increments.cumsum(0)])
    place = (depth.to(nodes.device) * (len(nodes) - 1)).clamp(0, len(nodes) - 1 - 1e-9)
    left = place.floor().long()
    r = torch.lerp(nodes[left], nodes[left + 1], place - left)
    vanish = (1 - alphas_cumprod[-1] / alphas_cumprod.clamp(min=1e-300)).clamp(min=0.0)
    return (alphas_cumprod * vanish).sqrt().to(r.device) * r


def initial_parameters() -> Tensor:
    """Parameters whose r_t is linear in log-SNR: (LEARNED_NODES,) float32."""
    return torch.full((LEARNED_NODES,), math.log(math.expm1(1.0 / LEARNED_NODES)))


SHAPES = {"constant": constant, "bump": bump, "early": early, "none": none}
SCHEDULES = (*SHAPES, "learned")
DEFAULT_SCALE = 1.5


def cumulative_weights(
    alphas: Tensor,
    schedule: str,
    scale: float = DEFAULT_SCALE,
    parameters: Tensor | None = None,
    log_scale: Tensor | float = 0.0,
) -> Tensor:
    """W_t for t = 1 … T: (T,) float64, with max_t W_t = scale · exp(log_scale)."""
    shape = SHAPES[schedule](alphas) if parameters is None else learned(alphas, parameters)
    peak = shape.max().clamp(min=torch.finfo(torch.float64).tiny)
    gain = torch.as_tensor(log_scale, dtype=torch.float64, device=shape.device).exp()
    return scale * gain * shape / peak


def step_weights(alphas: Tensor, cumulative: Tensor) -> Tensor:
    """w_t = W_t/√a_t − W_{t−1}, Eq. (3) solved for w_t; w_t := 0 where a_t = 0."""
    before = torch.cat([cumulative.new_zeros(1), cumulative[:-1]])
    alphas = alphas.to(cumulative.device)
    return torch.where(alphas > 0, cumulative / alphas.clamp(min=1e-300).sqrt() - before, 0.0)
