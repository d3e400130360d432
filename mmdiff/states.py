"""Distributions of the state of every modality in training: absent, aggregated or observed (docs/theory.md, section 4).

A diffused modality has a time besides: that of the anchor, or one of its own (section 9).

A draw is a pure function of counter-based uniform numbers, so that accumulation, several processes and a resumed run
draw the same states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

COLUMNS = 3  # uniform numbers of a sample from each stream


class StateProbabilities(NamedTuple):
    """Probabilities of a modality's two flags; their joint meaning depends on the distribution."""

    aggregated: float
    observed: float


class Flags(NamedTuple):
    """(N, B) bool each, for N modalities in the order of their names. A modality without a flag is *absent*."""

    aggregated: Tensor
    observed: Tensor


def streams(names: Sequence[str]) -> list[str]:
    """The names of the streams of random numbers that a draw takes: one per modality, then two for all."""
    return [*(f"states/{name}" for name in names), "alone", "half"]


class Draw(NamedTuple):
    """What flags are a function of.

    ``uniforms`` (N + 2, B, `COLUMNS`) are numbers in (0, 1) of the `streams`. ``probabilities`` (N, 2) float32 are
    those of (aggregated, observed), ``anchor`` is the anchor's index.
    """

    uniforms: Tensor
    probabilities: Tensor
    anchor: int

    @property
    def alone(self) -> Tensor:
        """(B, 3): whether the anchor, which other, whether that."""
        return self.uniforms[-2]

    @property
    def half(self) -> Tensor:
        """(B,)."""
        return self.uniforms[-1, :, 0]


def independent(draw: Draw) -> Flags:
    """All flags are independent: P(flags) is the product over all modalities and both flags."""
    drawn = draw.uniforms[:-2, :, :2] < draw.probabilities[:, None]  # (N, B, 2)
    return Flags(*drawn.unbind(2))


def each_alone(draw: Draw) -> Flags:
    """At most one modality is observed; the aggregated flags are as in `independent`.

    Let a be `observed` of the anchor and p_i that of auxiliary modality i of N. The anchor is observed with probability
    a. Otherwise one auxiliary modality is picked uniformly and observed with probability p_i. So P({anchor}) = a,
    P({i}) = (1 − a) p_i / N and P(∅) = (1 − a)(1 − Σ_i p_i / N).
    """
    anchor, observed = draw.anchor, draw.probabilities[:, 1, None]  # (N, 1)
    indices = torch.arange(len(observed), device=observed.device)[:, None]  # (N, 1)
    whether_anchor, which, whether = draw.alone.unbind(1)  # (B,) each
    picked = (which * (len(observed) - 1)).long()
    picked = picked + (picked >= anchor)  # the index of an auxiliary modality
    others = whether_anchor >= observed[anchor]
    flags = others & (indices == picked) & (whether < observed)
    return Flags(independent(draw).aggregated, flags | (~others & (indices == anchor)))


def half_alone(draw: Draw) -> Flags:
    """`each_alone` for half of the samples, `independent` for the other half.

    With many modalities `independent` rarely observes none or one of them. Here these cases have at least half of the
    probability, and every subset has some.
    """
    alone, free = each_alone(draw), independent(draw)
    return Flags(free.aggregated, torch.where(draw.half < 0.5, alone.observed, free.observed))


class StateDistribution(NamedTuple):
    """``probabilities`` maps those of a config to those in use, ``draw`` draws the flags."""

    probabilities: Callable[[StateProbabilities], StateProbabilities]
    draw: Callable[[Draw], Flags]


DISTRIBUTIONS: dict[str, StateDistribution] = {
    "independent": StateDistribution(lambda set_by_config: set_by_config, independent),
    "each_alone": StateDistribution(lambda set_by_config: set_by_config, each_alone),
    "half_alone": StateDistribution(lambda set_by_config: set_by_config, half_alone),
    "source": StateDistribution(lambda _: StateProbabilities(1.0, 0.0), independent),  # always aggregated
    "heads": StateDistribution(lambda _: StateProbabilities(0.0, 0.0), independent),  # always absent
}

# ---------------------------------------------------------------------------------------- times of diffused modalities

TIME_NUMBERS = 16
READ_OWN_TIME = 0.5  # share of own times where the anchor is observed, of rows that do not observe the modality


class Times(NamedTuple):
    """(D, B) bool each, for D diffused modalities: where one has the anchor's time, where a time of its own. Elsewhere
    it is observed (time 0) or absent (time T)."""

    equal: Tensor
    own: Tensor


def draw_times(
    equal_numbers: Tensor, own_numbers: Tensor, observed: Tensor, denoised: Tensor, equal: float, own: float
) -> Times:
    """Times of all diffused modalities.

    With probability ``equal`` a row that denoises has one time for all, whatever would be observed. Else a modality
    that is not observed has a time of its own with probability ``own``, where nothing is denoised `READ_OWN_TIME`.

    Args:
        equal_numbers: (B,) uniform.
        own_numbers: (D, B) uniform.
        observed: (D, B) bool.
        denoised: (B,) bool.
        equal, own: probabilities.
    """
    together = (denoised & (equal_numbers < equal)).expand_as(observed)
    probability = torch.where(denoised, own, READ_OWN_TIME)
    return Times(together, ~together & ~observed & (own_numbers < probability))


def time_numbers(share: Tensor) -> Tensor:
    """τ/T (B,) in [0, 1] -> cos and sin of kπτ/T for k = 1 … 8, (B, 16); zeros at T, as of an absent modality."""
    angle = share[:, None] * (math.pi * torch.arange(1, TIME_NUMBERS // 2 + 1, device=share.device))
    return torch.cat([angle.cos(), angle.sin()], dim=1) * (share < 1)[:, None]
