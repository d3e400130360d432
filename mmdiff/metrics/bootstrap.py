"""Means with 95 % bootstrap intervals over samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap


def interval(correct: np.ndarray, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval (percentiles) of a mean over samples (n,)."""
    values = np.asarray(correct, dtype=np.float64)
    ends = bootstrap(
        (values,), np.mean, n_resamples=draws, batch=100, method="percentile", rng=seed
    ).confidence_interval
    return float(ends.low), float(ends.high)


def statistic_interval(
    statistic: Callable[..., float], *arrays: np.ndarray, seed: int = 0, draws: int = 1000
) -> tuple[float, float]:
    """95 % bootstrap interval (percentiles) of a statistic that is no mean.

    Args:
        statistic: arrays of equally many rows -> a number; called once per draw.
        arrays: (n, …) each; a draw takes the same rows of all.
    """

    def drawn(rows: np.ndarray, axis: int) -> np.ndarray:  # in batches: scipy's cost per call is ten times a draw's
        values = [statistic(*(array[one] for array in arrays)) for one in rows.reshape(-1, rows.shape[axis])]
        return np.reshape(values, rows.shape[:-1])

    ends = bootstrap(
        (np.arange(len(arrays[0])),), drawn, n_resamples=draws, batch=100, method="percentile", rng=seed
    ).confidence_interval
    return float(ends.low), float(ends.high)


def scored(name: str, per_sample: ArrayLike) -> dict[str, Any]:
    """The mean of scores or hits (n,), n ≥ 2, and under "<name>, 95 %" its interval [low, high]."""
    values = np.asarray(per_sample, dtype=np.float64)
    return with_interval(name, values.mean(), interval(values))


def with_interval(name: str, value: float, ends: tuple[float, float]) -> dict[str, Any]:
    return {name: float(value), f"{name}, 95 %": list(ends)}
