"""A two-label mixture whose posteriors are exact, and the joint law that samples of it must have (README)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

LABELS = torch.tensor([1.0, -1.0], dtype=torch.float64)  # E(0), E(1)
MODES = torch.tensor([0.6, -0.6], dtype=torch.float64)  # z_0 | label k ~ N(m_k, s²)
S = 0.25  # std of z_0: √(0.6² + 0.25²) = 0.650; label and sign agree with probability Φ(0.6/0.25) = 0.992


@dataclass(frozen=True)
class Joint:
    """Statistics of samples, or of the truth, that the laws compare."""

    std: float
    proportion: float  # of label 0
    agreement: float  # of the label with the sign of z_0
    between: float  # P(|z_0| < 0.3), what over-commitment empties


@dataclass(frozen=True)
class Mixture:
    """p(label), p(z_0 | label) and every posterior, exact. Tensors are (B, 1, 1, 1), labels in the last axis."""

    prior: float  # of label 0

    def posterior(self, z_t: Tensor, signal: Tensor, sigma: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """p(k | z_t), from z_t | k ~ N(s_t m_k + W E(k), s_t² s² + σ_t²), and E[z_0 | z_t, k]; both (B, 1, 1, 2)."""
        variance = (signal * S) ** 2 + sigma**2
        residual = z_t - signal * MODES - weight * LABELS
        prior = torch.tensor([self.prior, 1 - self.prior], dtype=torch.float64).log()
        mean = MODES + signal * S**2 / variance * residual
        return torch.softmax(prior - residual**2 / (2 * variance), -1), mean

    def expect(self, z_t: Tensor, signal: Tensor, sigma: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """E[z_0 | z_t] and E[ε | z_t], the label marginalised; the noise is that of u_t."""
        p, mean = self.posterior(z_t, signal, sigma, weight)
        noise = (z_t - weight * LABELS - signal * mean) / sigma
        return (p * mean).sum(-1, keepdim=True), (p * noise).sum(-1, keepdim=True)

    def read(self, z_0: Tensor, generator: torch.Generator) -> Joint:
        """The final read: a label drawn from p(k | z_0)."""
        p, _ = self.posterior(z_0, *torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
        first = torch.rand(z_0.shape, generator=generator, dtype=torch.float64) < p[..., :1]
        agreement, between = (first == (z_0 > 0)).double().mean(), (z_0.abs() < 0.3).double().mean()
        return Joint(float(z_0.std()), float(first.double().mean()), float(agreement), float(between))

    def truth(self, n: int) -> tuple[Joint, Joint]:
        """The joint law and the standard errors of its statistics over n samples, by quadrature."""
        z = torch.linspace(-3, 3, 60_001, dtype=torch.float64)  # 9.6 s beyond either mode
        density = torch.exp(-((z[:, None] - MODES) ** 2) / (2 * S**2)) * torch.tensor([self.prior, 1 - self.prior])
        density = density / density.sum()
        total = density.sum(1)
        centred = z - (total * z).sum()
        second, fourth = ((total * centred**k).sum() for k in (2, 4))
        agreement = density[z > 0, 0].sum() + density[z < 0, 1].sum()
        law = Joint(*map(float, (second.sqrt(), density[:, 0].sum(), agreement, total[z.abs() < 0.3].sum())))
        of_std = float((fourth - second**2).sqrt() / (2 * second.sqrt()))  # delta method
        chances = [p * (1 - p) for p in (law.proportion, law.agreement, law.between)]
        return law, Joint(*(error / n**0.5 for error in (of_std, *(c**0.5 for c in chances))))


def fed(how: str, p: Tensor, generator: torch.Generator) -> Tensor:
    """The encoding of the label as it is re-read at one call."""
    if how == "mean":
        return (p * LABELS).sum(-1, keepdim=True)
    uniform = torch.rand(p[..., :1].shape, generator=generator, dtype=torch.float64) if how == "draw" else 0.5
    return torch.where(p[..., :1] > uniform, LABELS[0], LABELS[1])


def assert_is_the_joint_law(got: Joint, n: int, steps: int, prior: float = 0.5) -> None:
    """Within 3 standard errors plus what the steps cost.

    An encoding is held over a step, which makes every solver first order in it: the bias is C/steps. Over 400 000
    samples it is at most 0.010 in `std` (DDIM, mean), 0.008 in `between` and 0.0011 in `agreement` (DDPM, draw) at 200
    steps, hence C = 2 and 0.3. Equal labels have no bias in the proportion. The faults below are 0.14 in `std` and
    0.11 in `between`, ten times as large.
    """
    truth, error = Mixture(prior).truth(n)
    assert got.std == pytest.approx(truth.std, abs=3 * error.std + 2 / steps)
    assert got.between == pytest.approx(truth.between, abs=3 * error.between + 2 / steps)
    assert got.agreement == pytest.approx(truth.agreement, abs=3 * error.agreement + 0.3 / steps)
    assert got.proportion == pytest.approx(truth.proportion, abs=3 * error.proportion + abs(prior - 0.5) * 2 / steps)
