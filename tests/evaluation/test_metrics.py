"""Metrics against closed forms and on data whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.linalg import sqrtm

from mmdiff.evaluation.metrics import (
    MEMORISED_EXPECTED,
    Judge,
    RealImages,
    class_shares,
    frechet_distance,
    interval,
)


def with_moments(mean: np.ndarray, covariance: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows (n, d) whose sample mean and covariance are exactly these."""
    rows = np.random.default_rng(seed).standard_normal((count, len(mean)))
    rows -= rows.mean(0)
    white = rows @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(rows, rowvar=False)))).T
    return mean + white @ np.linalg.cholesky(covariance).T


def law(dimension: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((dimension, dimension))
    return rng.standard_normal(dimension), factor @ factor.T + 0.1 * np.eye(dimension)


@pytest.mark.parametrize("dimension", [1, 2, 5, 20])
def test_frechet_distance_is_the_closed_form(dimension: int) -> None:
    (m, s), (n, r) = law(dimension, 0), law(dimension, 1)
    root = sqrtm(s)
    expected = ((m - n) ** 2).sum() + np.trace(s + r - 2 * sqrtm(root @ r @ root).real)
    actual = frechet_distance(with_moments(m, s, 500, 2), with_moments(n, r, 300, 3))
    assert actual == pytest.approx(float(expected), rel=1e-8)


def test_frechet_distance_is_a_squared_metric_on_laws() -> None:
    one, other = with_moments(*law(4, 0), 200, 2), with_moments(*law(4, 1), 200, 3)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-6)  # √ of rounding errors of about 1e-14
    assert frechet_distance(one + 3.0, one) == pytest.approx(4 * 3.0**2, rel=1e-6)  # shifted in 4 dimensions
    # twice the rows have covariance 4 S: tr(4 S + S − 2 · 2 S) = tr S is left when the means agree
    spread = frechet_distance(2 * one, one + one.mean(0))
    assert spread == pytest.approx(float(np.trace(np.cov(one, rowvar=False))), rel=1e-6)


def test_frechet_distance_of_a_degenerate_covariance() -> None:
    """Images have constant pixels: |m − m'|² + σ² is left where the other law is a point in one direction."""
    rows = with_moments(np.zeros(2), np.eye(2), 100, 0)
    flat = rows * np.array([1.0, 0.0])
    assert frechet_distance(rows, flat) == pytest.approx(1.0, abs=1e-6)


def images(count: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """(n, 1, 4, 4), correlated pixels."""
    mixing = np.random.default_rng(99).standard_normal((16, 16)) / 4
    return (scale * np.random.default_rng(seed).standard_normal((count, 16)) @ mixing).reshape(-1, 1, 4, 4)


def test_samples_of_the_same_law_are_at_the_floor() -> None:
    real = RealImages(images(1000, 1), images(100, 2), components=8)
    distance, floor = real.frechet_distance(images(1000, 0))
    assert floor > 0
    assert 0.5 < distance / floor < 2.0  # two draws of one small positive statistic
    far, same_floor = real.frechet_distance(images(1000, 0, scale=2.0))
    assert same_floor == floor
    assert far > 10 * floor


def test_the_floor_falls_with_the_number_of_rows() -> None:
    """A squared distance of two empirical laws falls like 1/n: a quarter at four times the rows."""
    floors = [
        RealImages(images(2 * n, 1), images(10, 2), components=8).frechet_distance(images(n, 0))[1] for n in (200, 800)
    ]
    assert 0.15 < floors[1] / floors[0] < 0.4


@pytest.mark.parametrize(("samples", "train"), [(50, 20), (5, 50)])
def test_few_rows_are_enough(samples: int, train: int) -> None:
    """Fewer rows than the default 32 components."""
    pixels = np.random.default_rng(0).standard_normal((samples + train, 1, 8, 8))
    real = RealImages(pixels[samples:], pixels[:samples])
    assert all(math.isfinite(x) for x in real.frechet_distance(pixels[:samples]))


def test_fresh_rows_are_memorised_by_half_and_copies_entirely() -> None:
    train, held_out, fresh = images(500, 0), images(500, 1), images(500, 2)
    real = RealImages(train, held_out)
    share = real.memorised_share(fresh)
    # a share of 500 against a median of 500: both vary with variance ¼ / 500
    assert abs(share - MEMORISED_EXPECTED) < 4 * math.sqrt(2 * 0.25 / 500)
    assert real.memorised_share(train[:100]) == 1.0
    assert real.memorised_share(held_out) == 0.5
    assert real.memorised_share(images(500, 2, scale=10.0)) == 0.0


def test_the_judge_is_right_on_separable_classes() -> None:
    labels = np.arange(300) % 3
    pixels = images(300, 0, scale=0.1) + labels[:, None, None, None]  # classes are 1 apart in each pixel, noise is 0.1
    judge = Judge(pixels[:150], labels[:150])
    assert (judge(pixels[150:]) == labels[150:]).all()
    assert (Judge(pixels[:150], labels[:150], neighbours=1)(pixels[:150]) == labels[:150]).all()


def test_the_judge_is_at_chance_without_a_signal() -> None:
    labels = np.random.default_rng(3).integers(2, size=2000)
    correct = Judge(images(1000, 0), labels[:1000])(images(1000, 1)) == labels[1000:]
    assert abs(correct.mean() - 0.5) < 4 * math.sqrt(0.25 / 1000)


def test_intervals_cover_the_mean() -> None:
    """At n = 100 a percentile interval covers about 0.94; 300 repetitions have a standard error of 0.014."""
    rng = np.random.default_rng(0)
    covered = [low <= 0.7 <= high for low, high in (interval(rng.random(100) < 0.7, k, draws=300) for k in range(300))]
    assert abs(np.mean(covered) - 0.94) < 4 * 0.014


def test_intervals_have_the_width_of_the_normal_law() -> None:
    low, high = interval(np.arange(400) % 2 == 0)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / math.sqrt(400), rel=0.1)  # 2000 draws: quantiles to 5 %
    assert (low + high) / 2 == pytest.approx(0.5, abs=0.01)
    assert interval(np.ones(10)) == (1.0, 1.0)
    assert interval(np.arange(5), seed=1) == interval(np.arange(5), seed=1)


def test_class_shares_are_a_histogram() -> None:
    assert class_shares(np.array([0, 2, 2, 2]), num_classes=4) == [0.25, 0.0, 0.75, 0.0]
