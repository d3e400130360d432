"""Scores of class ids and of vectors that should find their partner."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import precision_recall_fscore_support

from mmdiff.errors import InputError
from mmdiff.metrics.bootstrap import scored, statistic_interval, with_interval


def class_shares(labels: np.ndarray, num_classes: int) -> list[float]:
    """The histogram of class ids as shares."""
    return (np.bincount(labels, minlength=num_classes) / len(labels)).tolist()


def classification(predicted: ArrayLike, truth: ArrayLike, num_classes: int) -> dict[str, Any]:
    """Accuracy, macro precision and macro recall of class ids (n,), each with its 95 % interval.

    The means are over all ``num_classes``; a class that is never predicted (or never true) counts as 0.

    Raises:
        InputError: an id outside 0 … num_classes − 1.
    """
    predicted, truth = np.asarray(predicted, dtype=np.int64), np.asarray(truth, dtype=np.int64)
    cells = cells_of(predicted, truth, num_classes)
    precision, recall, _, _ = precision_recall_fscore_support(
        truth, predicted, labels=range(num_classes), average="macro", zero_division=0
    )

    def drawn(axis: int) -> tuple[float, float]:  # sklearn takes milliseconds per call, and there are 1000
        return statistic_interval(lambda cells: _macro(matrix_of(cells, num_classes), axis), cells)

    return (
        scored("accuracy", predicted == truth)
        | with_interval("macro precision", precision, drawn(axis=0))
        | with_interval("macro recall", recall, drawn(axis=1))
    )


def retrieval(queries: ArrayLike, candidates: ArrayLike, among: int = 64) -> dict[str, Any]:
    """Does a row of ``queries`` (n, d) find its own row of ``candidates`` (n, d) by the highest cosine?

    Rows are taken in consecutive groups of ``among`` (all n rows, if they are fewer); an incomplete last group is left
    out. Chance is 1 / group. "cosine" is the mean over all n pairs.
    """
    one, other = _unit(queries), _unit(candidates)
    size = min(among, len(one))
    groups = len(one) // size
    grouped = [rows[: groups * size].reshape(groups, size, -1) for rows in (one, other)]
    cosines = np.einsum("gqd,gcd->gqc", *grouped, optimize=True)
    hits = cosines.argmax(axis=2) == np.arange(size)  # (groups, size)
    return scored(f"retrieval@1 among {size}", hits.ravel()) | scored("cosine", (one * other).sum(1))


def cells_of(predicted: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Class ids (n,) -> places in the flattened confusion matrix (n,)."""
    for what, ids in (("predicted", predicted), ("truth", truth)):
        outside = ids[(ids < 0) | (ids >= num_classes)]
        if len(outside):
            raise InputError(what, int(outside[0]), f"class ids are 0 … {num_classes - 1}; what is void is ignored")
    return truth * num_classes + predicted


def matrix_of(cells: np.ndarray, num_classes: int) -> np.ndarray:
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def _macro(matrix: np.ndarray, axis: int) -> float:
    """Macro precision (axis 0: per column) or recall (axis 1: per row) of a confusion matrix (K, K)."""
    return float((np.diagonal(matrix) / matrix.sum(axis).clip(min=1)).mean())


def _unit(rows: ArrayLike) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
