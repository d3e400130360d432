"""Every distribution gives each subset the probability of its closed form, however a batch is split."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import get_args

import pytest
import torch
from torch import Tensor

from mmdiff.config import StatesConfig
from mmdiff.randomness import uniforms
from mmdiff.states import COLUMNS, DISTRIBUTIONS, Draw, Flags, StateProbabilities, streams

COUNT = 20_000
ANCHOR = "image"
LAWS_OF = {  # no two alike, so that a mix-up shows; the anchor's name is neither the first nor the last
    "embedding": StateProbabilities(0.3, 0.6),
    ANCHOR: StateProbabilities(0.0, 0.2),
    "label": StateProbabilities(0.5, 0.3),
    "mask": StateProbabilities(0.8, 0.9),
}
AUXILIARY = sorted(set(LAWS_OF) - {ANCHOR})


def draw(
    distribution: str, probabilities: dict[str, StateProbabilities], positions: Tensor, seed: int = 3, step: int = 7
) -> Flags:
    """Flags by the modality's name."""
    names = sorted(probabilities)
    u = uniforms(seed, step, streams(names), positions, (COLUMNS,))
    given = Draw(u, torch.tensor([probabilities[name] for name in names]), names.index(ANCHOR))
    flags = DISTRIBUTIONS[distribution].draw(given)
    return Flags(*(dict(zip(names, flag, strict=True)) for flag in flags))


def product(chosen: frozenset[str], probabilities: dict[str, StateProbabilities], flag: int) -> float:
    return math.prod(
        distribution[flag] if name in chosen else 1 - distribution[flag] for name, distribution in probabilities.items()
    )


def alone(chosen: frozenset[str], probabilities: dict[str, StateProbabilities]) -> float:
    a, others = probabilities[ANCHOR].observed, [name for name in probabilities if name != ANCHOR]
    if len(chosen) > 1:
        return 0.0
    if not chosen:
        return (1 - a) * (1 - sum(probabilities[name].observed for name in others) / len(others))
    (name,) = chosen
    return a if name == ANCHOR else (1 - a) * probabilities[name].observed / len(others)


def half(chosen: frozenset[str], probabilities: dict[str, StateProbabilities]) -> float:
    return (alone(chosen, probabilities) + product(chosen, probabilities, flag=1)) / 2


OBSERVED = {
    "independent": partial(product, flag=1),
    "each_alone": alone,
    "half_alone": half,
    "source": lambda chosen, probabilities: float(not chosen),
    "heads": lambda chosen, probabilities: float(not chosen),
}
AGGREGATED = {
    "independent": partial(product, flag=0),
    "each_alone": partial(product, flag=0),
    "half_alone": partial(product, flag=0),
    "source": lambda chosen, probabilities: float(chosen == set(AUXILIARY)),
    "heads": lambda chosen, probabilities: float(not chosen),
}


def subsets(names: list[str]) -> list[frozenset[str]]:
    return [frozenset(s) for k in range(len(names) + 1) for s in itertools.combinations(names, k)]


def share(flags: dict[str, Tensor], chosen: frozenset[str]) -> float:
    """How often exactly these flags are set."""
    return float(torch.stack([flags[name] == (name in chosen) for name in flags]).all(dim=0).double().mean())


def given(distribution: str) -> dict[str, StateProbabilities]:
    """As `mmdiff.build.state_probabilities` gives them: the anchor is never aggregated."""
    probabilities = {name: DISTRIBUTIONS[distribution].probabilities(law) for name, law in LAWS_OF.items()}
    return {**probabilities, ANCHOR: probabilities[ANCHOR]._replace(aggregated=0.0)}


def test_every_subset_has_the_frequency_of_the_closed_form() -> None:
    for flag, distribution in itertools.product(["observed", "aggregated"], DISTRIBUTIONS):
        closed_form = {"observed": OBSERVED, "aggregated": AGGREGATED}[flag][distribution]
        flags = getattr(draw(distribution, given(distribution), torch.arange(COUNT)), flag)
        expected = {chosen: closed_form(chosen, LAWS_OF) for chosen in subsets(sorted(LAWS_OF))}
        if flag == "aggregated":
            expected = {chosen: p for chosen, p in expected.items() if ANCHOR not in chosen}
        assert sum(expected.values()) == pytest.approx(1.0)
        for chosen, p in expected.items():  # 16 comparisons, each off by 4.5 standard errors with probability 7e-6
            assert abs(share(flags, chosen) - p) <= 4.5 * math.sqrt(p * (1 - p) / COUNT), sorted(chosen)


def test_by_default_every_subset_occurs() -> None:
    for distribution, names in itertools.product([StatesConfig().distribution, "half_alone"], [["label"], [*"abcde"]]):
        states = StatesConfig(distribution=distribution)
        probabilities = {name: StateProbabilities(states.aggregated, states.observed) for name in names}
        probabilities[ANCHOR] = StateProbabilities(0.0, states.anchor_observed)
        chosen = {name: DISTRIBUTIONS[distribution].probabilities(pair) for name, pair in probabilities.items()}
        flags = draw(distribution, chosen, torch.arange(200_000))
        # the rarest of 2^6 subsets has p = 0.3^5 · 0.15 = 3.6e-4
        codes = sum(flags.observed[name].long() << k for k, name in enumerate(sorted(probabilities)))
        assert len(codes.unique()) == 2 ** len(probabilities), (distribution, names)


def test_alone_means_alone_and_the_aggregated_flags_do_not_depend_on_it() -> None:
    flags = draw("each_alone", LAWS_OF, torch.arange(COUNT))
    assert int(torch.stack([*flags.observed.values()]).sum(dim=0).max()) == 1
    other = draw("independent", LAWS_OF, torch.arange(COUNT))
    assert all(torch.equal(flags.aggregated[name], other.aggregated[name]) for name in LAWS_OF)
    for name in AUXILIARY:
        seen, p = flags.observed[name], LAWS_OF["label"].aggregated
        rate = float(flags.aggregated["label"][seen].double().mean())
        assert abs(rate - p) <= 4.5 * math.sqrt(p * (1 - p) / int(seen.sum()))


def test_any_split_of_the_batch_draws_the_same() -> None:
    for distribution in DISTRIBUTIONS:
        whole = draw(distribution, LAWS_OF, torch.arange(24))
        for parts in (torch.arange(24).chunk(4), [torch.arange(0, 24, 2), torch.arange(1, 24, 2)]):
            for positions in parts:
                part = draw(distribution, LAWS_OF, positions)
                for flags, other in zip(part, whole, strict=True):
                    assert flags.keys() == other.keys() == LAWS_OF.keys()
                    assert all(torch.equal(flags[name], other[name][positions]) for name in flags)


def test_steps_and_seeds_differ() -> None:
    one, *others = (
        draw("each_alone", LAWS_OF, torch.arange(64), seed, step) for seed, step in ((3, 7), (3, 8), (4, 7))
    )
    for other in others:
        assert any(not torch.equal(one.observed[name], other.observed[name]) for name in LAWS_OF)


def test_one_modality_beside_the_anchor_and_certain_probabilities() -> None:
    flags = draw(
        "each_alone", {ANCHOR: StateProbabilities(0.0, 0.0), "label": StateProbabilities(0.0, 1.0)}, torch.arange(100)
    )
    assert flags.observed["label"].all() and not flags.observed[ANCHOR].any()
    flags = draw(
        "each_alone", {ANCHOR: StateProbabilities(0.0, 1.0), "label": StateProbabilities(0.0, 1.0)}, torch.arange(100)
    )
    assert flags.observed[ANCHOR].all() and not flags.observed["label"].any()
    assert draw("each_alone", {ANCHOR: StateProbabilities(0.0, 1.0)}, torch.arange(9)).observed[ANCHOR].all()


def test_a_config_may_name_every_law() -> None:
    assert set(get_args(StatesConfig.model_fields["distribution"].annotation)) == set(DISTRIBUTIONS)
