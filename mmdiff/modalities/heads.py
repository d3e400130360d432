"""Heads on the backbone's features: a convolution per pixel, and a Gaussian of a map."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pixel_shuffle

from mmdiff.modalities.base import Shape
from mmdiff.modalities.grids import factor_of


def widened(x: Tensor) -> Tensor:
    """A modality's own weights, float32 at least: in a model of half precision only `decode` computes in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class SpatialHead(nn.Module):
    """Features (B, F, H / s, W / s) -> a map (B, channels, h, w) by one convolution and a pixel shuffle.

    Args:
        shape: the surroundings.
        channels: of the map.
        size: (h, w), a multiple or a divisor of the features' size.
    """

    def __init__(self, shape: Shape, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        grid = (shape.space[1] // shape.stride, shape.space[2] // shape.stride)
        self.up = factor_of(size, grid) if size[0] >= grid[0] else 1
        self.down = 1 if size[0] >= grid[0] else factor_of(grid, size)
        self.conv = nn.Conv2d(shape.features, channels * self.up**2, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        features = avg_pool2d(features, self.down) if self.down > 1 else features  # (B, F, h / up, w / up)
        return pixel_shuffle(self.conv(features), self.up)  # (B, channels, h, w)


class GaussianHead(nn.Module):
    """N(mean, σ² I) of a map, one σ per sample. Its params are (B, channels + 1, h, w): the mean, and log σ.

    Args:
        shape, channels, size: see `SpatialHead`.
    """

    def __init__(self, shape: Shape, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.mean = SpatialHead(shape, channels, size)
        self.log_std = nn.Linear(shape.pooled, 1)

    def forward(self, features: Tensor, pooled: Tensor) -> Tensor:
        mean = self.mean(features)  # (B, channels, h, w)
        log_std = self.log_std(pooled).clamp(-5.0, 2.0)[:, :, None, None]  # (B, 1, 1, 1)
        return torch.cat([mean, log_std.expand(-1, -1, *mean.shape[2:])], dim=1)


def gaussian_nll(params: Tensor, value: Tensor) -> Tensor:
    """−log density per pixel and channel, (B, channels, h, w), nats."""
    mean, log_std = params[:, :-1], params[:, -1:]
    return 0.5 * ((value - mean) / log_std.exp()) ** 2 + log_std + 0.5 * math.log(2 * math.pi)


def gaussian_sample(params: Tensor, noise: Tensor) -> Tensor:
    """mean + σ · noise."""
    return params[:, :-1] + params[:, -1:].exp() * noise
