"""How answers about a set of photos are scored, and what several seeds say together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn.metrics import precision_recall_fscore_support
from sklearn.preprocessing import MultiLabelBinarizer
from torch import Tensor


class Kind(NamedTuple):
    """Of a task: the items of an answer, and what precision and recall are means over (in scikit-learn's words)."""

    items: Callable[[str], set[str]]
    average: str


KINDS: dict[str, Kind] = {
    "label": Kind(lambda text: {text}, "macro"),  # over classes
    "attributes": Kind(lambda text: {part.strip() for part in text.split(",")} - {""}, "macro"),  # over attributes
    "caption": Kind(lambda text: set(text.split()), "samples"),  # words, over captions
}


def scores(kind: str, answers: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """Accuracy (all items right and none more), precision and recall of answers.

    Macro means are over the classes or attributes that are true of some set; other answers only count as wrong.

    Args:
        kind: a key of `KINDS`.
        answers, truth: equally many.
    """
    items, average = KINDS[kind]
    pairs = [(items(one), items(other)) for one, other in zip(answers, truth, strict=True)]
    real = sorted(set().union(*(right for _, right in pairs)))
    known = real if average == "macro" else sorted(set(real).union(*(own for own, _ in pairs)))
    table = MultiLabelBinarizer(classes=known).fit([])
    tables = [table.transform([[item for item in one if item in known] for one in side]) for side in zip(*pairs)]
    precision, recall, _, _ = precision_recall_fscore_support(tables[1], tables[0], average=average, zero_division=0)
    right = np.mean([own == other for own, other in pairs])
    return {"accuracy": float(right), "precision": float(precision), "recall": float(recall)}


def best(kind: str, candidates: Sequence[Sequence[str]], truth: Sequence[str]) -> list[str]:
    """Of several answers about each set the one that is nearest to the truth (largest ratio of common items)."""
    items = KINDS[kind].items

    def nearness(text: str, right: str) -> float:
        one, other = items(text), items(right)
        return len(one & other) / max(1, len(one | other))

    return [max(texts, key=lambda text: nearness(text, right)) for texts, right in zip(candidates, truth, strict=True)]


def plurality(candidates: Sequence[Sequence[str]], seed: int) -> list[str]:
    """The most frequent text of each set; ties are broken at random, and an empty text has no vote."""
    random, chosen = Random(seed), []
    for texts in candidates:
        votes = Counter(text for text in texts if text)
        most = max(votes.values(), default=0)
        first = sorted(text for text, count in votes.items() if count == most)
        chosen.append(random.choice(first) if first else "")
    return chosen


def mass(weights: Tensor, distractors: Sequence[Sequence[bool]]) -> dict[str, float]:
    """The weight that all distractors of a set have together, and what 1/n each would be: means over the sets with any.

    Args:
        weights: (B, n).
        distractors: of the B sets; empty where there is none.
    """
    some = [(row, flags) for row, flags in zip(weights.tolist(), distractors, strict=True) if any(flags)]
    if not some:
        return {}
    own = np.mean([sum(w for w, flag in zip(row, flags) if flag) for row, flags in some])
    even = np.mean([np.mean(flags) for _, flags in some])
    return {"weight on distractors": float(own), "1/n on distractors": float(even)}


def between_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean of one number per seed, and Student's 95 % interval of it (None for one seed)."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return {"mean": mean, "95 %": None, "by seed": list(values)}
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return {"mean": mean, "95 %": [mean - half, mean + half], "by seed": list(values)}
