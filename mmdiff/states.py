"""Distributions of the state of every modality in training: absent, aggregated or observed (docs/theory.md, section 4).

A draw is a pure function of counter-based uniform numbers, so that accumulation, several processes and a resumed run
draw the same states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

#: (stream, columns) -> (B, columns) uniform numbers in (0, 1), a function of (seed, step, stream, position) alone.
Uniforms = Callable[[str, int], Tensor]


class StateProbabilities(NamedTuple):
    """Probabilities of a modality's two flags; their joint meaning depends on the distribution."""

    aggregated: float
    observed: float


class Flags(NamedTuple):
    """{modality: (B,) bool} each, the anchor included. A modality without a flag is *absent*."""

    aggregated: dict[str, Tensor]
    observed: dict[str, Tensor]


def independent(uniforms: Uniforms, probabilities: Mapping[str, StateProbabilities], anchor: str) -> Flags:
    """All flags are independent: P(flags) is the product over all modalities and both flags.

    Args:
        uniforms: see `Uniforms`.
        probabilities: of every modality, the anchor included.
        anchor: name of the anchor.
    """
    drawn = {name: uniforms(f"states/{name}", 2) for name in sorted(probabilities)}  # (B, 2)
    return Flags(
        {name: u[:, 0] < probabilities[name].aggregated for name, u in drawn.items()},
        {name: u[:, 1] < probabilities[name].observed for name, u in drawn.items()},
    )


def each_alone(uniforms: Uniforms, probabilities: Mapping[str, StateProbabilities], anchor: str) -> Flags:
    """At most one modality is observed; the aggregated flags are as in `independent`.

    Let a be `observed` of the anchor and p_i that of auxiliary modality i of N. The anchor is observed with probability
    a. Otherwise one auxiliary modality is picked uniformly and observed with probability p_i. So P({anchor}) = a,
    P({i}) = (1 − a) p_i / N and P(∅) = (1 − a)(1 − Σ_i p_i / N).
    """
    auxiliary = sorted(set(probabilities) - {anchor})
    u = uniforms("alone", 3)  # (B, 3): whether the anchor, which other, whether that
    others = u[:, 0] >= probabilities[anchor].observed
    picked = (u[:, 1] * len(auxiliary)).long()  # (B,)
    observed = {
        name: others & (picked == index) & (u[:, 2] < probabilities[name].observed)
        for index, name in enumerate(auxiliary)
    }
    return Flags(independent(uniforms, probabilities, anchor).aggregated, {**observed, anchor: ~others})


def half_alone(uniforms: Uniforms, probabilities: Mapping[str, StateProbabilities], anchor: str) -> Flags:
    """`each_alone` for half of the samples, `independent` for the other half.

    With many modalities `independent` rarely observes none or one of them. Here these cases have at least half of the
    probability, and every subset has some.
    """
    half = uniforms("half", 1)[:, 0] < 0.5  # (B,)
    alone, free = each_alone(uniforms, probabilities, anchor), independent(uniforms, probabilities, anchor)
    return Flags(
        free.aggregated, {name: torch.where(half, flag, free.observed[name]) for name, flag in alone.observed.items()}
    )


class StateDistribution(NamedTuple):
    """``probabilities`` maps those of a config to those in use, ``draw`` draws the flags of all modalities."""

    probabilities: Callable[[StateProbabilities], StateProbabilities]
    draw: Callable[[Uniforms, Mapping[str, StateProbabilities], str], Flags]


DISTRIBUTIONS: dict[str, StateDistribution] = {
    "independent": StateDistribution(lambda set_by_config: set_by_config, independent),
    "each_alone": StateDistribution(lambda set_by_config: set_by_config, each_alone),
    "half_alone": StateDistribution(lambda set_by_config: set_by_config, half_alone),
    "source": StateDistribution(lambda _: StateProbabilities(1.0, 0.0), independent),  # always aggregated
    "heads": StateDistribution(lambda _: StateProbabilities(0.0, 0.0), independent),  # always absent
}
