"""What a network may predict of u_t = s_t z_0 + σ_t ε, and the conversions to z_0 and u_t."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Conversion = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Prediction(NamedTuple):
    """Three functions of two tensors and (s_t, σ_t), broadcastable to (B, C, H, W)."""

    target: Conversion  # (z_0, ε) -> the network's target
    original: Conversion  # (output, u_t) -> z_0
    output: Conversion  # (z_0, u_t) -> output, the inverse of `original`


PREDICTIONS = {
    "v_prediction": Prediction(  # where s² + σ² = 1
        target=lambda z_0, noise, s, sigma: s * noise - sigma * z_0,
        original=lambda output, u_t, s, sigma: s * u_t - sigma * output,
        output=lambda z_0, u_t, s, sigma: (s * u_t - z_0) / sigma,
    ),
    "velocity": Prediction(  # where s + σ = 1
        target=lambda z_0, noise, s, sigma: noise - z_0,
        original=lambda output, u_t, s, sigma: u_t - sigma * output,
        output=lambda z_0, u_t, s, sigma: (u_t - z_0) / sigma,
    ),
    "epsilon": Prediction(
        target=lambda z_0, noise, s, sigma: noise,
        original=lambda output, u_t, s, sigma: (u_t - sigma * output) / s,
        output=lambda z_0, u_t, s, sigma: (u_t - s * z_0) / sigma,
    ),
    "sample": Prediction(
        target=lambda z_0, noise, s, sigma: z_0,
        original=lambda output, u_t, s, sigma: output,
        output=lambda z_0, u_t, s, sigma: z_0,
    ),
}
