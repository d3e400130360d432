"""Metrics as plain functions of arrays; every judge is trained apart, on real training rows."""

from __future__ import annotations

import numpy as np
from scipy.stats import bootstrap
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors


class Judge:
    """k-nearest-neighbour classifier on training pixels, independent of any model.

    Args:
        images: (n, …) training images.
        labels: (n,) class ids.
        neighbours: k.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, neighbours: int = 3) -> None:
        self._knn = KNeighborsClassifier(n_neighbors=neighbours).fit(_flat(images), labels)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(n, …) -> class ids (n,)."""
        return self._knn.predict(_flat(images))


def interval(correct: np.ndarray, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval (percentiles) of a mean over samples (n,)."""
    values = np.asarray(correct, dtype=np.float64)
    found = bootstrap((values,), np.mean, n_resamples=draws, method="percentile", rng=seed).confidence_interval
    return float(found.low), float(found.high)


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features (n, d): |m − m'|² + tr(S + S' − 2 (S S')^½)."""
    mean, covariance = one.mean(0), np.atleast_2d(np.cov(one, rowvar=False))
    other_mean, other_covariance = other.mean(0), np.atleast_2d(np.cov(other, rowvar=False))
    # the trace of the square root needs only the eigenvalues, which are those of a positive matrix
    eigenvalues = np.linalg.eigvals(covariance @ other_covariance).real.clip(min=0)
    spread = np.trace(covariance) + np.trace(other_covariance) - 2 * np.sqrt(eigenvalues).sum()
    return float(((mean - other_mean) ** 2).sum() + spread)


class RealImages:
    """Real images that samples are set against: what is fitted to them is fitted once.

    Args:
        train, held_out: (n, …) each.
        components: principal components, fitted on the training rows.
    """

    def __init__(self, train: np.ndarray, held_out: np.ndarray, components: int = 32) -> None:
        train = _flat(train)
        self._pca = PCA(n_components=min(components, *train.shape), svd_solver="full").fit(train)
        self._features = self._pca.transform(train)
        self._nearest = NearestNeighbors(n_neighbors=1).fit(train)
        self._typical = np.median(self._distances(held_out))

    def frechet_distance(self, samples: np.ndarray, splits: int = 5, seed: int = 0) -> tuple[float, float]:
        """(distance, floor) on the principal components.

        In each split n = min(half of train, samples) of the samples are set against n random training rows; the floor
        is n other training rows against the same. Means over the splits.
        """
        rng = np.random.default_rng(seed)
        real, fake = self._features, self._pca.transform(_flat(samples))
        size = min(len(real) // 2, len(fake))
        distances, floors = [], []
        for _ in range(splits):
            order = rng.permutation(len(real))
            reference, rest = real[order[:size]], real[order[size : 2 * size]]
            distances.append(frechet_distance(fake[rng.permutation(len(fake))[:size]], reference))
            floors.append(frechet_distance(rest, reference))
        return float(np.mean(distances)), float(np.mean(floors))

    def memorised_share(self, samples: np.ndarray) -> float:
        """Share of samples nearer to a training row than held-out rows typically (by their median) are."""
        return float((self._distances(samples) < self._typical).mean())

    def _distances(self, images: np.ndarray) -> np.ndarray:
        return self._nearest.kneighbors(_flat(images))[0]


MEMORISED_EXPECTED = 0.5  # half of fresh real rows lie below the median of fresh real rows


def class_shares(labels: np.ndarray, num_classes: int) -> list[float]:
    """The histogram of class ids as shares."""
    return (np.bincount(labels, minlength=num_classes) / len(labels)).tolist()


def _flat(images: np.ndarray) -> np.ndarray:
    return np.asarray(images, dtype=np.float64).reshape(len(images), -1)
