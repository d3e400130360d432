"""Distributions of the state of every modality in training: absent, aggregated or observed (docs/theory.md, section 4).

A draw is a pure function of counter-based uniform numbers, so that accumulation, several processes and a resumed run
draw the same states.
"""

from __future__ import annotations

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
