"""Nearest neighbours in pixels: a judge of classes, and the memorisation test."""

from __future__ import annotations

import numpy as np
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from mmdiff.metrics.features import flat


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


MEMORISED_EXPECTED = 0.5  # half of fresh real rows lie below the median of fresh real rows


class MemorisationTest:
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


def _floats(images: np.ndarray) -> np.ndarray:
    """float32 halves the memory of many rows; distances need no more."""
    return flat(images).astype(np.float32)
