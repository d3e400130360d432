"""Log-likelihoods, divergences and draws of the distributions in the equations; torch only."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

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


def categorical_sample(logits: Tensor, noise: Tensor) -> Tensor:
    """Class ids by inverse-CDF sampling: logits (B, K, ...), standard normal noise (B, ...) -> (B, ...) int64."""
    u = torch.special.ndtr(noise.to(logits.dtype)).unsqueeze(1)  # (B, 1, ...), uniform
    below = logits.softmax(dim=1).cumsum(dim=1) < u  # (B, K, ...)
    return below.sum(dim=1).clamp(max=logits.shape[1] - 1)


def mean_logits(logits: list[Tensor]) -> Tensor:
    """Logits (B, K, ...) of the mean of several categorical distributions."""
    return torch.stack([part.log_softmax(dim=1) for part in logits]).logsumexp(dim=0) - math.log(len(logits))


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


# --------------------------------------------------------------------------------------- von Mises–Fisher on the sphere
# Computed in float64, as κ − log I_ν(κ) cancels, and returned in the input's dtype.


def _debye_coefficients(terms: int) -> list[list[float]]:
    """Row k holds the coefficients of u_k(p)/p^k in powers of p², by the recursion DLMF 10.41.9."""
    rows = [[Fraction(1)]]
    for k in range(terms):
        row = [Fraction(0)] * (k + 2)
        for j, coefficient in enumerate(rows[-1]):
            power = k + 2 * j
            row[j] += coefficient * (Fraction(power, 2) + Fraction(1, 8 * (power + 1)))
            row[j + 1] -= coefficient * (Fraction(power, 2) + Fraction(5, 8 * (power + 3)))
        rows.append(row)
    return [[float(coefficient) for coefficient in row] for row in rows]


_DEBYE = _debye_coefficients(8)
_DEBYE_ORDER = 30  # for larger orders the error of eight terms is below 1e-13


def _log_bessel_debye(order: float, x: Tensor) -> Tensor:
    """log I_ν(x) by the uniform expansion DLMF 10.41.3, for ν of `_DEBYE_ORDER` or more and every x > 0."""
    root = (order**2 + x**2).sqrt()
    squared = (order / root) ** 2  # p²
    series = torch.zeros_like(x)
    for row in reversed(_DEBYE):  # Horner's rule in p/ν, whose coefficients are polynomials in p²
        inner = torch.zeros_like(x)
        for coefficient in reversed(row):
            inner = inner * squared + coefficient
        series = series / root + inner
    return root + order * (x / (order + root)).log() - 0.5 * (2 * math.pi * root).log() + series.log()


def log_bessel_i(order: float, x: Tensor) -> Tensor:
    """log I_ν(x), the modified Bessel function of the first kind, differentiable in x.

    Args:
        order: ν ≥ 0.
        x: positive, any shape; float32 or float64.
    """
    wide = x.double()
    value = _log_bessel_debye(order, wide) if order >= _DEBYE_ORDER else _LowOrder.apply(order, wide)
    return value.to(x.dtype)


class _LowOrder(torch.autograd.Function):
    """log I_ν(x) for ν below `_DEBYE_ORDER`; the recursion gives its slope I_{ν+1}/I_ν + ν/x, DLMF 10.29.2, for free.

    Autograd would go back through all steps of the recursion, four times as long.
    """

    @staticmethod
    def forward(ctx: Any, order: float, x: Tensor) -> Tensor:
        steps = math.ceil(_DEBYE_ORDER - order)
        value = _log_bessel_debye(order + steps, x)
        ratio = (_log_bessel_debye(order + steps + 1, x) - value).exp()  # I_{μ+1}/I_μ at the highest order μ
        for k in range(steps, 0, -1):  # I_{μ−1} = I_{μ+1} + (2μ/x) I_μ, stable downwards
            ratio = 1 / (ratio + 2 * (order + k) / x)
            value = value - ratio.log()
        ctx.order = order
        ctx.save_for_backward(x, ratio + order / x)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        x, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            slope = (log_bessel_i(ctx.order + 1, x) - log_bessel_i(ctx.order, x)).exp() + ctx.order / x
        return None, gradient * slope


def vmf_log_prob(mean_direction: Tensor, concentration: Tensor, value: Tensor) -> Tensor:
    """log density in nats with respect to the surface measure of the unit sphere in D ≥ 2 dimensions: (B,).

    Args:
        mean_direction: unit vectors (B, D).
        concentration: κ > 0, (B,).
        value: unit vectors (B, D).
    """
    kappa, dimension = concentration.double(), value.shape[1]
    order = dimension / 2 - 1
    normaliser = order * kappa.log() - dimension / 2 * math.log(2 * math.pi) - log_bessel_i(order, kappa)
    cosine = (mean_direction.double() * value.double()).sum(dim=1)
    return (normaliser + kappa * cosine).to(concentration.dtype)


def vmf_mean_length(dimension: int, concentration: Tensor) -> Tensor:
    """A_D(κ) = I_{D/2}(κ)/I_{D/2−1}(κ), the length of the mean vector, in (0, 1): the shape of ``concentration``."""
    kappa = concentration.double()
    ratio = log_bessel_i(dimension / 2, kappa) - log_bessel_i(dimension / 2 - 1, kappa)
    return ratio.exp().to(concentration.dtype)


@torch.no_grad()
def vmf_sample(mean_direction: Tensor, concentration: Tensor, noise: Tensor) -> Tensor:
    """Unit vectors (B, D), a function of each sample's own noise; no gradient.

    Args:
        mean_direction: unit vectors (B, D), D ≥ 2.
        concentration: κ > 0, (B,).
        noise: standard normal numbers (B, D + 1): one for the angle, D for the direction away from the mean.
    """
    mean = torch.nn.functional.normalize(mean_direction.double(), dim=1)
    uniform = torch.special.ndtr(noise[:, :1].double())
    angle = _vmf_angle(mean.shape[1], concentration.double()[:, None], uniform)  # (B, 1)
    tangent = noise[:, 1:].double()
    tangent = tangent - (tangent * mean).sum(dim=1, keepdim=True) * mean
    tangent = torch.nn.functional.normalize(tangent, dim=1)
    return (angle.cos() * mean + angle.sin() * tangent).to(mean_direction.dtype)


def _vmf_angle(dimension: int, kappa: Tensor, uniform: Tensor, points: int = 1024) -> Tensor:
    """Quantiles (B, 1) of the angle to the mean, whose density is ∝ sin^{D−2}θ · e^{κ cos θ}; all arguments (B, 1).

    The density of the cosine would have a pole at ±1 for D = 2. The grid spans ten standard deviations of the normal
    approximation at the mode to either side, within [0, π].
    """
    free = dimension - 2
    cosine = 2 * kappa / (free + (free**2 + 4 * kappa**2).sqrt())
    mode = cosine.clamp(max=1).acos()
    curvature = kappa * cosine + (free / (1 - cosine**2) if free else 0)
    reach = 10 / curvature.sqrt()
    low, high = (mode - reach).clamp(min=0), (mode + reach).clamp(max=math.pi)
    grid = low + (high - low) * torch.linspace(0, 1, points, dtype=kappa.dtype, device=kappa.device)  # (B, points)
    sine = grid.sin().clamp(min=0)
    log_density = torch.xlogy(torch.full_like(sine, free), sine) + kappa * (grid.cos() - 1)
    density = (log_density - log_density.amax(dim=1, keepdim=True)).exp()
    mass = torch.cumulative_trapezoid(density, dim=1)  # (B, points − 1)
    mass = torch.nn.functional.pad(mass / mass[:, -1:], (1, 0))
    wanted = uniform.clamp(1e-15, 1 - 1e-15)
    right = torch.searchsorted(mass, wanted).clamp(1, points - 1)  # (B, 1)
    below, above = mass.gather(1, right - 1), mass.gather(1, right)
    return torch.lerp(grid.gather(1, right - 1), grid.gather(1, right), (wanted - below) / (above - below))
