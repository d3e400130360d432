"""How training draws the state of every modality: absent, aggregated or observed (docs/theory.md, section 4).

A distribution is a pure function of counter-based uniforms, so that accumulation, several processes and a resumed run
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
    """A modality's probabilities of its two flags; what they mean together is the distribution's."""

    aggregated: float
    observed: float


class Flags(NamedTuple):
    """{modality: (B,) bool} each, the anchor included; neither flag is *absent*."""

    aggregated: dict[str, Tensor]
    observed: dict[str, Tensor]


def independent(uniforms: Uniforms, probabilities: Mapping[str, StateProbabilities], anchor: str) -> Flags:
    """Every flag by itself: P(flags) is the product over all modalities and both flags.

    Args:
        uniforms: see `Uniforms`.
        probabilities: {modality: StateProbabilities}, the anchor included.
        anchor: its name.
    """
    drawn = {name: uniforms(f"states/{name}", 2) for name in sorted(probabilities)}  # (B, 2)
    return Flags(
        {name: u[:, 0] < probabilities[name].aggregated for name, u in drawn.items()},
        {name: u[:, 1] < probabilities[name].observed for name, u in drawn.items()},
    )


def each_alone(uniforms: Uniforms, probabilities: Mapping[str, StateProbabilities], anchor: str) -> Flags:
    """At most one modality is observed, and then alone; the aggregated flags are as in `independent`.

    With a the anchor's `observed` and p_i that of the auxiliary modality i of N: the anchor is observed with
    probability a; otherwise one auxiliary modality is picked uniformly and observed with its own probability. So
    P({anchor}) = a, P({i}) = (1 − a) p_i / N and P(∅) = (1 − a)(1 − Σ_i p_i / N).
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
    """`each_alone` for half of the samples, `independent` for the others.

    Of several modalities `independent` shows nothing, or one, ever more rarely: with this one every subset keeps a
    positive probability, and those two keep most of it.
    """
    half = uniforms("half", 1)[:, 0] < 0.5  # (B,)
    alone, free = each_alone(uniforms, probabilities, anchor), independent(uniforms, probabilities, anchor)
    return Flags(
        free.aggregated, {name: torch.where(half, seen, free.observed[name]) for name, seen in alone.observed.items()}
    )


class StateDistribution(NamedTuple):
    """``given`` makes a modality's probabilities of what a config sets, ``draw`` draws all flags at once."""

    given: Callable[[StateProbabilities], StateProbabilities]
    draw: Callable[[Uniforms, Mapping[str, StateProbabilities], str], Flags]


DISTRIBUTIONS: dict[str, StateDistribution] = {
    "independent": StateDistribution(lambda set_by_config: set_by_config, independent),
    "each_alone": StateDistribution(lambda set_by_config: set_by_config, each_alone),
    "half_alone": StateDistribution(lambda set_by_config: set_by_config, half_alone),
    "source": StateDistribution(lambda _: StateProbabilities(1.0, 0.0), independent),  # always aggregated
    "heads": StateDistribution(lambda _: StateProbabilities(0.0, 0.0), independent),  # always absent
}
