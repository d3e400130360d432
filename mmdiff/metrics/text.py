"""Scores of texts against their references."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmdiff.metrics.bootstrap import scored, statistic_interval, with_interval


def captions(
    predicted: Sequence[str], truth: Sequence[str], attributes: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """Exact match, agreement by attribute, BLEU (Papineni et al., 2002) and the character error rate, by torchmetrics.

    BLEU is that of each text, with smoothed counts, so that short texts have one; its words end at white space. The
    error rate is the edits over the characters of the truth, for any script.

    Args:
        predicted, truth: texts (n,).
        attributes: {attribute: its words}; a text's value is the set of these words that it has.
    """
    from torchmetrics.functional.text import bleu_score, edit_distance

    pairs = list(zip(predicted, truth, strict=True))
    scores = scored("exact match", [one == other for one, other in pairs])
    hits = [[_has(one, words) == _has(other, words) for one, other in pairs] for words in (attributes or {}).values()]
    for name, hit in zip(attributes or {}, hits):
        scores |= scored(name, hit)
    if hits:
        scores |= scored("all attributes", np.all(hits, axis=0))
    bleu = [float(bleu_score([one], [[other]], smooth=True)) if one and other else one == other for one, other in pairs]
    edits = [edit_distance(one, other, reduction="sum") / max(len(other), 1) for one, other in pairs]
    return scores | scored("BLEU-4", bleu) | scored("character error rate", np.array(edits))


def _has(text: str, words: Sequence[str]) -> set[str]:
    found = set(re.findall(r"\w+", text.casefold()))
    return {word for word in words if word.casefold() in found}


def perplexity(nats: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """exp(Σ nats / Σ tokens) of texts, and the nats of a text.

    Args:
        nats: −log p of each text (n,).
        tokens: how many tokens it has, that of its end included (n,).
    """

    def of(some: np.ndarray, counts: np.ndarray) -> float:
        return float(np.exp(some.sum() / counts.sum()))

    ends = statistic_interval(of, nats, tokens)
    return with_interval("perplexity", of(nats, tokens), ends) | scored("nats per text", nats)
