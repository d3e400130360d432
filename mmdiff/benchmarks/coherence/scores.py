"""Joint and conditional coherence of images, by what classifiers read (Shi et al., 2019; Sutter et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdiff.benchmarks.coherence.classifiers import Classifier

Images = dict[str, Tensor]  # {modality: (n, C, H, W) in [−1, 1]}
Generate = Callable[[Images], Images]  # what is given -> the rest


def subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every subset that is neither empty nor whole, the small ones first."""
    for size in range(1, len(names)):
        yield from combinations(names, size)


def joint_coherence(images: Images, judges: Mapping[str, Classifier]) -> float:
    """The share of rows in which all judges read the same class."""
    read = torch.stack([judges[name].read(values).argmax(1) for name, values in images.items()])  # (M, n)
    return float((read == read[0]).all(dim=0).double().mean())


def conditional_coherence(
    generate: Generate, truth: Images, labels: Tensor, judges: Mapping[str, Classifier]
) -> list[dict[str, Any]]:
    """For each size of the given subset the scores of what is generated from it.

    ``coherence`` is the share of generated images that show the class of the row, a mean over the modalities that are
    not given and over the subsets. ``label accuracy`` is the share of rows whose class all judges together read (the
    sum of their log-probabilities) from the generated images.

    Args:
        generate: images of some modalities -> those of the others.
        truth: real held-out rows.
        labels: (n,) their classes.
        judges: of each modality.
    """
    rows: list[dict[str, Any]] = []
    for given in subsets(list(truth)):
        drawn = generate({name: truth[name] for name in given})
        read = {name: judges[name].read(drawn[name]) for name in truth if name not in given}
        right = {name: _accuracy(values, labels) for name, values in read.items()}
        together = _accuracy(torch.stack(list(read.values())).sum(0), labels)
        rows.append({"given": list(given), "by modality": right, "label accuracy": together})
    return [_of_size(size, [row for row in rows if len(row["given"]) == size]) for size in range(1, len(truth))]


def _of_size(size: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    coherence = float(np.mean([value for row in rows for value in row["by modality"].values()]))
    labels = float(np.mean([row["label accuracy"] for row in rows]))
    return {"given": size, "coherence": coherence, "label accuracy": labels, "subsets": rows}


def _accuracy(log_probabilities: Tensor, labels: Tensor) -> float:
    return float((log_probabilities.argmax(1) == labels).double().mean())
