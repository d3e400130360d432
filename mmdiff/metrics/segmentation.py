"""Scores of maps of class ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mmdiff.errors import InputError
from mmdiff.metrics.bootstrap import statistic_interval, with_interval
from mmdiff.metrics.classification import cells_of, matrix_of


def confusions(predicted: ArrayLike, truth: ArrayLike, num_classes: int, ignore: int | None) -> np.ndarray:
    """Confusion matrices of maps of class ids (n, H, W) -> int64 (n, K, K), truth in rows, predictions in columns.

    Pixels whose truth is ``ignore`` are left out.

    Raises:
        InputError: an id outside 0 … K − 1.
    """
    predicted, truth = np.asarray(predicted), np.asarray(truth)
    matrices = np.empty((len(truth), num_classes, num_classes), dtype=np.int64)
    for matrix, guess, real in zip(matrices, predicted, truth, strict=True):
        counts = np.full(real.shape, True) if ignore is None else real != ignore
        cells = cells_of(guess[counts].astype(np.int64), real[counts].astype(np.int64), num_classes)
        matrix[:] = matrix_of(cells, num_classes)
    return matrices


def segmentation(predicted: ArrayLike, truth: ArrayLike, num_classes: int, ignore: int | None = None) -> dict[str, Any]:
    """mIoU and pixel accuracy of maps of class ids (n, H, W), over the pixels of all images, with 95 % intervals.

    mIoU is the mean over the classes that occur in truth or prediction; "IoU per class" has None for the others. The
    class ``ignore`` takes no part in the mean. The intervals are over images.

    Raises:
        InputError: an id outside 0 … K − 1, or every pixel is ignored.
    """
    matrices = confusions(predicted, truth, num_classes, ignore)
    matrices = matrices[matrices.any(axis=(1, 2))]  # an image without pixels that count says nothing
    if not len(matrices):
        raise InputError("evaluate.segmentation", ignore, "every pixel of the truth has the class to ignore")
    # hits, pixels of the truth and of the prediction are enough, and fewer than K² numbers: (n, 3 K)
    sums = np.concatenate([np.diagonal(matrices, axis1=1, axis2=2), matrices.sum(2), matrices.sum(1)], axis=1)
    sums = sums.astype(np.float64)  # matrix products of integers are slow; counts stay exact
    kept = np.arange(num_classes) != (-1 if ignore is None else ignore)

    def mean_iou(total: np.ndarray) -> float:
        return float(np.nanmean(_iou(total.reshape(3, num_classes))[kept]))

    def accuracy(total: np.ndarray) -> float:
        hits, real, _ = total.reshape(3, num_classes).sum(1)
        return float(hits / real)

    def drawn(statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
        def of_rows(rows: np.ndarray) -> float:
            return statistic(np.bincount(rows, minlength=len(sums)) @ sums)

        return statistic_interval(of_rows, np.arange(len(sums)))

    total = sums.sum(0)
    per_class = np.where(kept, _iou(total.reshape(3, num_classes)), np.nan)
    return (
        with_interval("mIoU", mean_iou(total), drawn(mean_iou))
        | with_interval("pixel accuracy", accuracy(total), drawn(accuracy))
        | {"IoU per class": [None if np.isnan(value) else float(value) for value in per_class]}
    )


def _iou(sums: np.ndarray) -> np.ndarray:
    """Hits, true and predicted pixels (3, K) -> (K,); NaN where a class does not occur."""
    hits, real, guessed = sums
    union = real + guessed - hits
    return np.divide(hits, union, out=np.full_like(union, np.nan), where=union > 0)
