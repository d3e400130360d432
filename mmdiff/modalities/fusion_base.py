"""The contract of a fusion: several embeddings of one thing become one (docs/theory.md, section 7)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmdiff.errors import InputError
from mmdiff.modalities.ragged import Sets, packed


class Fused(NamedTuple):
    """``embedding`` (B, d) or (B, tokens, d); ``weights`` (B, n), which add up to 1 and are 0 where no member is."""

    embedding: Tensor
    weights: Tensor


class Fusion(nn.Module, ABC):
    """Members (B, n, d), or (B, n, tokens, d), a mask (B, n), true where a member is, and a query -> `Fused`.

    Most fusions take no query; one of `QUERY_FUSIONS` needs one, (B, q), for every set.

    Every token position is a set of its own; its weights are then averaged over the tokens. A place without a member
    may hold anything, NaN too. The order of members and places without one change nothing, and one member is its own
    fusion: bit-exactly on a CPU, in every precision. What else is in the batch changes results by rounding: by 1e-14 of
    the largest member in float64, 1e-6 in float32. bfloat16 is computed in float32 and the result rounded (0.4 %).

    Args:
        dim: d.
        hidden: width of the attentions' layer.

    Raises:
        InputError: for an empty set (on an accelerator: an assertion of the device), for shapes that do not fit, and
            for a query that is missing or has no effect.
    """

    query_dim: int = 0  # q; 0: takes no query

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__()
        if dim < 1 or hidden < 1:
            raise InputError("dim" if dim < 1 else "hidden", dim if dim < 1 else hidden, "needs one number at least")
        self.dim = dim

    def forward(self, members: Tensor, mask: Tensor, query: Tensor | None = None) -> Fused:
        self._check(members, mask)
        self._check_query(len(mask), query)
        wide = members.to(torch.promote_types(members.dtype, torch.float32))
        image_sets = (wide if wide.ndim == 4 else wide[:, :, None]).transpose(1, 2)  # (B, T, n, d)
        size, tokens, count, _ = image_sets.shape
        sets = packed(image_sets.flatten(0, 1), mask.repeat_interleave(tokens, dim=0))
        scores = self._of_set(image_sets, mask, sets, query)
        fused, table = self.fuse(sets, scores)  # (B T, d), (B T, m)
        weights = sets.places(table, count).reshape(size, tokens, count).mean(dim=1)  # (B, n)
        return Fused(fused.reshape(size, *members.shape[2:]).to(members.dtype), weights)

    @abstractmethod
    def fuse(self, sets: Sets, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """(embeddings (B, d), weights (B, m)) of B sets; ``scores`` (N,): `set_scores` of the rows."""

    def set_scores(self, wholes: Sets, query: Tensor | None) -> Tensor | None:
        """What set and query say of each member as a whole, the mean of its tokens: a score (N,), or None."""
        return None

    def _of_set(self, image_sets: Tensor, mask: Tensor, sets: Sets, query: Tensor | None) -> Tensor | None:
        """`set_scores` of members (B, T, n, d) for the rows of their token sets."""
        size, tokens, count, _ = image_sets.shape
        wholes = sets if tokens == 1 else packed(image_sets.mean(dim=1), mask)
        scores = self.set_scores(wholes, query)
        if scores is None or tokens == 1:
            return scores
        table = wholes.places(wholes.table(scores, gap=0.0), count)  # (B, n)
        return sets.flat(table.repeat_interleave(tokens, dim=0).gather(1, sets.order))

    def _check(self, members: Tensor, mask: Tensor) -> None:
        if members.ndim not in (3, 4) or members.shape[-1] != self.dim or 0 in members.shape[2:]:
            raise InputError("members", tuple(members.shape), f"needs (B, n, {self.dim}) or (B, n, tokens, {self.dim})")
        if mask.dtype != torch.bool or mask.shape != members.shape[:2]:
            actual = f"{mask.dtype} {tuple(mask.shape)}"
            raise InputError("mask", actual, f"needs torch.bool of shape {tuple(members.shape[:2])}")
        filled = mask.any(dim=1)
        if mask.device.type != "cpu" or torch.compiler.is_compiling():
            torch._assert_async(filled.all(), "mask: a set is empty; every set needs a member at least")
        elif not filled.all():
            empty = int(filled.byte().argmin())
            raise InputError("mask", f"set {empty} of {len(mask)}", "is empty; every set needs a member at least")

    def _check_query(self, size: int, query: Tensor | None) -> None:
        wanted = (size, self.query_dim) if self.query_dim else None
        actual = None if query is None else tuple(query.shape)
        if actual != wanted:
            remedy = f"needs a query of shape {wanted}" if wanted else "would have no effect; this fusion takes none"
            raise InputError("query", actual, remedy)
