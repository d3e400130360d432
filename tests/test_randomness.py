"""Counter-based random numbers depend on (seed, step, stream, position) only, and have the moments they promise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from mmdiff.randomness import fold, normal, uniform

DRAWS = 10**6
Draw = Callable[..., Tensor]
BOTH: list[Draw] = [normal, uniform]


def correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1])


def test_any_split_and_order_of_positions_gives_the_same_rows() -> None:
    for draw, shape in itertools.product(BOTH, [(), (1,), (3,), (2, 3), (3, 5, 7)]):
        whole = draw(3, 5, "noise", torch.arange(12), shape)
        assert whole.shape == (12, *shape)
        assert whole.dtype == torch.float32
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        assert torch.equal(draw(3, 5, "noise", order, shape), whole[order])
        for size in (1, 5):
            parts = [draw(3, 5, "noise", part, shape) for part in torch.arange(12).split(size)]
            assert torch.equal(torch.cat(parts), whole)


def test_repetition_is_exact_and_leaves_the_global_generator_alone() -> None:
    for draw in BOTH:
        state = torch.get_rng_state()
        first = draw(0, 0, "times", torch.arange(4), (3,))
        assert torch.equal(first, draw(0, 0, "times", torch.arange(4), (3,)))
        assert torch.equal(state, torch.get_rng_state())


def test_each_coordinate_gives_unrelated_numbers() -> None:
    for draw, other in itertools.product(
        [normal, uniform],
        [(2, 0, "noise", 0), (1, 1, "noise", 0), (1, 0, "times", 0), (1, 0, "noise", 1000), (0, 1, "noise", 0)],
    ):
        seed, step, stream, start = other
        reference = draw(1, 0, "noise", torch.arange(1000), (100,)).flatten()
        changed = draw(seed, step, stream, torch.arange(start, start + 1000), (100,)).flatten()
        assert not (reference == changed).all()
        assert abs(correlation(reference, changed)) < 5 / math.sqrt(reference.numel())


def test_keys_of_many_coordinates_do_not_collide() -> None:
    keys = {fold(s, k, n) for s in (-1, 0, 1, 2**31, 2**63) for k in range(200) for n in ("noise", "times", "states")}
    assert len(keys) == 5 * 200 * 3


def test_extreme_counters_are_finite() -> None:
    for positions, seed in itertools.product([torch.tensor([0]), torch.tensor([2**40, 2**62])], [0, -7, 2**64 - 1]):
        assert normal(seed, 10**12, "noise", positions, (5,)).isfinite().all()


def test_moments_of_normal() -> None:
    for shape in [(1,), (1000,), (999,)]:
        rows = math.ceil(DRAWS / shape[0])
        x = normal(0, 0, "noise", torch.arange(rows), shape).double().flatten()
        n = x.numel()
        # Var of the mean, of the second, third and fourth moment of N(0, 1): 1, 2, 15, 96, each over n
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs(float((x**power).mean()) - moment) < 5 * math.sqrt(variance / n)


def test_moments_of_uniform() -> None:
    for shape in [(), (1000,)]:
        x = uniform(0, 0, "times", torch.arange(DRAWS // math.prod(shape)), shape).double().flatten()
        assert 0 < float(x.min()) < float(x.max()) < 1
        # moment k of U(0, 1) is 1/(k + 1); the variance of x^k is 1/(2k + 1) − 1/(k + 1)²
        for power in (1, 2, 3, 4):
            variance = 1 / (2 * power + 1) - 1 / (power + 1) ** 2
            assert abs(float((x**power).mean()) - 1 / (power + 1)) < 5 * math.sqrt(variance / DRAWS)


def test_normal_follows_the_normal_law_everywhere() -> None:
    """Kolmogorov's distance: exceeds 2.0/√n with probability 2·exp(−8) ≈ 7e-4."""
    x = normal(1, 2, "noise", torch.arange(1000), (1000,)).double().flatten().sort().values
    ranks = (torch.arange(DRAWS) + 0.5) / DRAWS
    assert float((torch.special.ndtr(x) - ranks).abs().max()) < 2.0 / math.sqrt(DRAWS)


def test_halves_of_a_pair_are_independent() -> None:
    for moment in [1, 2]:
        x = normal(0, 0, "noise", torch.arange(1000), (1000,)).flatten()
        cosines, sines = x[0::2] ** moment, x[1::2] ** moment
        assert abs(correlation(cosines, sines)) < 5 / math.sqrt(cosines.numel())


def test_neighbouring_positions_are_independent() -> None:
    for draw, lag in itertools.product(BOTH, [1, 2, 64]):
        x = draw(0, 0, "noise", torch.arange(10_000), (100,))
        assert abs(correlation(x[:-lag].flatten(), x[lag:].flatten())) < 5 / math.sqrt(x[lag:].numel())


def test_neighbouring_steps_and_columns_are_independent() -> None:
    for draw in BOTH:
        x = torch.stack([draw(0, step, "noise", torch.arange(100), (20,)) for step in range(200)])
        for one, other in ((x[:-1], x[1:]), (x[..., :-2], x[..., 2:])):
            assert abs(correlation(one.flatten(), other.flatten())) < 5 / math.sqrt(one.numel())
