"""Metrics as plain functions of arrays; every judge is trained apart, on real training rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import bootstrap
from sklearn.metrics import precision_recall_fscore_support
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.evaluation.features import flat

PSNR_OF_EQUAL = 100.0  # dB, instead of infinity: a mean over images stays finite
_BATCH = 64


class Judge:
    """k-nearest-neighbour classifier on training pixels, independent of any model.

    Args:
        images: (n, …) training images.
        labels: (n,) class ids.
        neighbours: k.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, neighbours: int = 3) -> None:
        self._knn = KNeighborsClassifier(n_neighbors=neighbours).fit(flat(images), labels)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(n, …) -> class ids (n,)."""
        return self._knn.predict(flat(images))


def interval(correct: np.ndarray, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval (percentiles) of a mean over samples (n,)."""
    values = np.asarray(correct, dtype=np.float64)
    found = bootstrap(
        (values,), np.mean, n_resamples=draws, batch=100, method="percentile", rng=seed
    ).confidence_interval
    return float(found.low), float(found.high)


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

    found = bootstrap(
        (np.arange(len(arrays[0])),), drawn, n_resamples=draws, batch=100, method="percentile", rng=seed
    ).confidence_interval
    return float(found.low), float(found.high)


def scored(name: str, per_sample: ArrayLike) -> dict[str, Any]:
    """The mean of scores or hits (n,), n ≥ 2, and under "<name>, 95 %" its interval [low, high]."""
    values = np.asarray(per_sample, dtype=np.float64)
    return _with_interval(name, values.mean(), interval(values))


class Memory:
    """How near samples come to training rows, against how near held-out rows come (Euclidean, in pixels).

    Args:
        train, held_out: real images (n, …) each.
    """

    def __init__(self, train: np.ndarray, held_out: np.ndarray) -> None:
        self._nearest = NearestNeighbors(n_neighbors=1).fit(_floats(train))
        self._typical = np.median(self._distances(held_out))

    def share(self, samples: np.ndarray) -> float:
        """Share of samples nearer to a training row than held-out rows typically (by their median) are."""
        return float((self._distances(samples) < self._typical).mean())

    def _distances(self, images: np.ndarray) -> np.ndarray:
        return self._nearest.kneighbors(_floats(images))[0]


MEMORISED_EXPECTED = 0.5  # half of fresh real rows lie below the median of fresh real rows


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
    cells = _cells(predicted, truth, num_classes)
    precision, recall, _, _ = precision_recall_fscore_support(
        truth, predicted, labels=range(num_classes), average="macro", zero_division=0
    )

    def drawn(axis: int) -> tuple[float, float]:  # sklearn takes milliseconds per call, and there are 1000
        return statistic_interval(lambda cells: _macro(_matrix(cells, num_classes), axis), cells)

    return (
        scored("accuracy", predicted == truth)
        | _with_interval("macro precision", precision, drawn(axis=0))
        | _with_interval("macro recall", recall, drawn(axis=1))
    )


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
        cells = _cells(guess[counts].astype(np.int64), real[counts].astype(np.int64), num_classes)
        matrix[:] = _matrix(cells, num_classes)
    return matrices


def segmentation(predicted: ArrayLike, truth: ArrayLike, num_classes: int, ignore: int | None = None) -> dict[str, Any]:
    """mIoU and pixel accuracy of maps of class ids (n, H, W), over the pixels of all images, with 95 % intervals.

    mIoU is the mean over the classes that occur in truth or prediction; "IoU per class" has None for the others. Where
    ``ignore`` is itself a class, it takes no part in the mean. The intervals are over images.

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
        _with_interval("mIoU", mean_iou(total), drawn(mean_iou))
        | _with_interval("pixel accuracy", accuracy(total), drawn(accuracy))
        | {"IoU per class": [None if np.isnan(value) else float(value) for value in per_class]}
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


def psnr(images: Tensor, truth: Tensor, where: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of images (n, C, H, W) in [−1, 1] -> (n,) in dB, at most `PSNR_OF_EQUAL`.

    Args:
        where: (n, 1, H, W), 1 = pixels that count; default all.

    Raises:
        InputError: in some image no pixel counts.
    """
    error = _mean_over((images.double() - truth.double()) ** 2, where)
    return (10 * torch.log10(2.0**2 / error)).clamp(max=PSNR_OF_EQUAL)


def ssim(images: Tensor, truth: Tensor, where: Tensor | None = None) -> Tensor:
    """Structural similarity of images (n, C, H, W) in [−1, 1] -> (n,); the map's mean over the pixels that count.

    The index is that of intensities in [0, 1]. Its Gaussian window has 11 pixels (σ = 1.5); for images of fewer pixels
    it is the largest odd window that fits, with σ in proportion. Computed in float32: nearly flat images to about 2e-4.

    Args:
        where: (n, 1, H, W), 1 = pixels that count; default all.

    Raises:
        InputError: images of fewer than 3 pixels, or an image in which no pixel counts.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    radius = min(5, (min(images.shape[2:]) - 1) // 2)
    if radius < 1:
        raise InputError("evaluate.ssim", tuple(images.shape[2:]), "SSIM needs images of 3 pixels at least")
    maps = []
    for one, other in zip(images.split(_BATCH), truth.split(_BATCH), strict=True):
        _, full = structural_similarity_index_measure(
            (one.float() + 1) / 2,
            (other.float() + 1) / 2,
            sigma=1.5 * radius / 5,  # from which torchmetrics takes a window of 2 · radius + 1
            data_range=1.0,
            reduction="none",
            return_full_image=True,
        )
        maps.append(full)
    return _mean_over(torch.cat(maps), where)


def _mean_over(values: Tensor, where: Tensor | None) -> Tensor:
    """(n, C, H, W) -> (n,): means over channels and the pixels that count (n, 1, H, W)."""
    if where is None:
        return values.mean(dim=(1, 2, 3))
    pixels = where.to(values)
    counted = pixels.sum(dim=(1, 2, 3))
    if not counted.all():
        raise InputError("where", 0, "an image without pixels that count has no score; leave it out")
    return (values.mean(dim=1, keepdim=True) * pixels).sum(dim=(1, 2, 3)) / counted


def _floats(images: np.ndarray) -> np.ndarray:
    """float32 halves the memory of many rows; distances need no more."""
    return flat(images).astype(np.float32)


def _with_interval(name: str, value: float, found: tuple[float, float]) -> dict[str, Any]:
    return {name: float(value), f"{name}, 95 %": list(found)}


def _cells(predicted: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Class ids (n,) -> places in the flattened confusion matrix (n,)."""
    for what, ids in (("predicted", predicted), ("truth", truth)):
        outside = ids[(ids < 0) | (ids >= num_classes)]
        if len(outside):
            raise InputError(what, int(outside[0]), f"class ids are 0 … {num_classes - 1}; what is void is ignored")
    return truth * num_classes + predicted


def _matrix(cells: np.ndarray, num_classes: int) -> np.ndarray:
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def _macro(matrix: np.ndarray, axis: int) -> float:
    """Macro precision (axis 0: per column) or recall (axis 1: per row) of a confusion matrix (K, K)."""
    return float((np.diagonal(matrix) / matrix.sum(axis).clip(min=1)).mean())


def _iou(sums: np.ndarray) -> np.ndarray:
    """Hits, true and predicted pixels (3, K) -> (K,); NaN where a class does not occur."""
    hits, real, guessed = sums
    union = real + guessed - hits
    return np.divide(hits, union, out=np.full_like(union, np.nan), where=union > 0)


def _unit(rows: ArrayLike) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
