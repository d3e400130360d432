"""Log-likelihoods and divergences of the distributions that the equations use; torch only."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def sum_except_batch(x: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return x.flatten(1).sum(dim=1) if x.ndim > 1 else x


def mean_except_batch(x: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return x.flatten(1).mean(dim=1) if x.ndim > 1 else x


class Gaussian(NamedTuple):
    """N(mean, variance · I). ``variance`` broadcasts against ``mean``."""

    mean: Tensor
    variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + √variance · noise."""
        return self.mean + self.variance.sqrt() * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """log density in nats, summed over all dimensions but the batch: (B,)."""
        variance = self.variance.expand_as(self.mean)
        return sum_except_batch(-0.5 * ((value - self.mean) ** 2 / variance + torch.log(2 * math.pi * variance)))

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self ‖ other) in nats, summed over all dimensions but the batch: (B,)."""
        ratio = self.variance / other.variance
        per_dim = 0.5 * ((self.mean - other.mean) ** 2 / other.variance + ratio - 1 - ratio.log())
        return sum_except_batch(per_dim.expand_as(self.mean))


def categorical_log_prob(logits: Tensor, value: Tensor) -> Tensor:
    """log p(value) of class ids: logits (B, K, ...), value (B, ...) int64 -> (B, ...), nats."""
    return -torch.nn.functional.cross_entropy(logits, value, reduction="none")


def discretised_gaussian_log_prob(mean: Tensor, variance: Tensor, value: Tensor, levels: int = 256) -> Tensor:
    """log mass of quantised values under N(mean, variance), the edge bins taking the tails: (B, ...), nats.

    ``value`` lies on the grid of ``levels`` points from −1 to 1, as 8-bit images do (DDPM, Eq. 13).
    """
    half = 1.0 / (levels - 1)
    std = variance.sqrt()
    upper = torch.special.ndtr((value + half - mean) / std)
    lower = torch.special.ndtr((value - half - mean) / std)
    upper = torch.where(value > 1 - half, torch.ones_like(upper), upper)
    lower = torch.where(value < -1 + half, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=torch.finfo(mean.dtype).tiny).log()
