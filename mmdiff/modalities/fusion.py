"""Several embeddings of one thing become one, whatever their order and number (docs/theory.md, section 7)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear

from mmdiff.errors import InputError


class Fused(NamedTuple):
    """``embedding`` (B, d) or (B, tokens, d); ``weights`` (B, n), which add up to 1 and are 0 where no member is."""

    embedding: Tensor
    weights: Tensor


class Sets(NamedTuple):
    """Ragged sets without their gaps: the N members of all B sets, one after another.

    Within a set they stand in an order that their values decide. So a sum over them comes out the same to the last bit
    wherever they stood and whatever stood in the gaps.

    ``rows`` (N, d); ``starts`` (B,) of each set in them; ``owners`` (N,) which set each belongs to; ``order`` (B, m)
    the place in its set that each came from, where ``filled`` (B, m) is true; m is the size of the largest set.
    """

    rows: Tensor
    starts: Tensor
    owners: Tensor
    order: Tensor
    filled: Tensor

    def table(self, numbers: Tensor, gap: float) -> Tensor:
        """One number per member (N,) -> (B, m), ``gap`` elsewhere."""
        return numbers.new_full(self.filled.shape, gap).masked_scatter(self.filled, numbers)

    def places(self, table: Tensor, size: int) -> Tensor:
        """Numbers (B, m) -> (B, size), each in the place that its member came from."""
        return table.new_zeros(len(table), size).scatter(1, self.order, table)

    def sums(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Σ over each set of rows (N, d), weighted by (N,): (B, d)."""
        every = torch.arange(len(rows), device=rows.device)
        return embedding_bag(every, rows, self.starts, mode="sum", per_sample_weights=weights)


class Fusion(nn.Module, ABC):
    """Members (B, n, d), or (B, n, tokens, d), and a mask (B, n), true where a member is -> `Fused`.

    Every token position is a set of its own; its weights are then averaged over the tokens. A place without a member
    may hold anything, NaN too. The order of members and places without one change nothing, and one member is its own
    fusion: bit-exactly on a CPU, in every precision. What else is in the batch changes results by rounding: by 1e-14 of
    the largest member in float64, 1e-6 in float32. bfloat16 is computed in float32 and the result rounded (0.4 %).

    Args:
        dim: d.
        hidden: width of the attentions' layer.

    Raises:
        InputError: for an empty set, and for shapes that do not fit.
    """

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__()
        if dim < 1 or hidden < 1:
            raise InputError("dim" if dim < 1 else "hidden", dim if dim < 1 else hidden, "needs one number at least")
        self.dim = dim

    def forward(self, members: Tensor, mask: Tensor) -> Fused:
        self._check(members, mask)
        wide = members.to(torch.promote_types(members.dtype, torch.float32))
        image_sets = (wide if wide.ndim == 4 else wide[:, :, None]).transpose(1, 2)  # (B, T, n, d)
        size, tokens, count, _ = image_sets.shape
        sets = _packed(image_sets.flatten(0, 1), mask.repeat_interleave(tokens, dim=0))
        fused, table = self.fuse(sets)  # (B T, d), (B T, m)
        weights = sets.places(table, count).reshape(size, tokens, count).mean(dim=1)  # (B, n)
        return Fused(fused.reshape(size, *members.shape[2:]).to(members.dtype), weights)

    @abstractmethod
    def fuse(self, sets: Sets) -> tuple[Tensor, Tensor]:
        """(embeddings (B, d), weights (B, m)) of B sets."""

    def _check(self, members: Tensor, mask: Tensor) -> None:
        if members.ndim not in (3, 4) or members.shape[-1] != self.dim or 0 in members.shape[2:]:
            raise InputError("members", tuple(members.shape), f"needs (B, n, {self.dim}) or (B, n, tokens, {self.dim})")
        if mask.dtype != torch.bool or mask.shape != members.shape[:2]:
            actual = f"{mask.dtype} {tuple(mask.shape)}"
            raise InputError("mask", actual, f"needs torch.bool of shape {tuple(members.shape[:2])}")
        filled = mask.any(dim=1)
        if not filled.all():
            empty = int(filled.byte().argmin())
            raise InputError("mask", f"set {empty} of {len(mask)}", "is empty; every set needs a member at least")


class Weighted(Fusion):
    """Σ_k a_k h_k with a = softmax_k of a score of each member."""

    def fuse(self, sets: Sets) -> tuple[Tensor, Tensor]:
        scores = self.score(sets.rows).to(sets.rows.dtype)  # (N,); autocast may have narrowed them
        weights = sets.table(scores, gap=-torch.inf).softmax(dim=1)  # (B, m)
        return sets.sums(sets.rows, weights[sets.filled]), weights

    @abstractmethod
    def score(self, members: Tensor) -> Tensor:
        """(N, d) -> (N,)."""


class Mean(Weighted):
    """Eq. (14), left: Σ h_k / n; the weights are 1 / n."""

    def score(self, members: Tensor) -> Tensor:
        return members.new_zeros(len(members))


class Max(Fusion):
    """Eq. (14), right: the largest of every feature; the weights are the shares of features that members win.

    Members that tie for a feature share it evenly, and so they share its gradient. The weights have none.
    """

    def fuse(self, sets: Sets) -> tuple[Tensor, Tensor]:
        owners = sets.owners[:, None].expand_as(sets.rows)  # (N, d)
        lowest = sets.rows.new_full((len(sets.starts), self.dim), -torch.inf)
        largest = lowest.scatter_reduce(0, owners, sets.rows, "amax")  # (B, d)
        with torch.no_grad():
            wins = (sets.rows == largest[sets.owners]).to(largest.dtype)  # (N, d)
            shares = (wins / sets.sums(wins)[sets.owners]).mean(dim=1)  # (N,)
        return largest, sets.table(shares, gap=0.0)


class Attention(Weighted):
    """Eq. (15): a = softmax_k( vᵀ tanh(V h_k) )."""

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__(dim, hidden)
        self.V, self.v = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, 1, bias=False)

    def score(self, members: Tensor) -> Tensor:
        return _linear(_linear(members, self.V).tanh(), self.v).squeeze(1)


class GatedAttention(Attention):
    """Eq. (16): a = softmax_k( vᵀ( tanh(V h_k) ⊙ sigmoid(U h_k) ) )."""

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__(dim, hidden)
        self.U = nn.Linear(dim, hidden, bias=False)

    def score(self, members: Tensor) -> Tensor:
        gated = _linear(members, self.V).tanh() * _linear(members, self.U).sigmoid()  # (N, hidden)
        return _linear(gated, self.v).squeeze(1)


FUSIONS: dict[str, type[Fusion]] = {
    "mean": Mean,
    "max": Max,
    "attention": Attention,
    "gated_attention": GatedAttention,
}


def build_fusion(kind: str, dim: int, hidden: int = 128) -> Fusion:
    """A fusion by its name.

    Args:
        kind: a key of `FUSIONS`.
        dim, hidden: see `Fusion`.

    Raises:
        InputError: for an unknown name, or a width below 1.
    """
    if kind not in FUSIONS:
        raise InputError("fusion", kind, f"choose one of {', '.join(FUSIONS)}")
    return FUSIONS[kind](dim, hidden)


def _packed(image_sets: Tensor, mask: Tensor) -> Sets:
    """ImageSets (B, n, d) and their mask (B, n) without the gaps."""
    counts = mask.sum(dim=1)  # (B,)
    largest = max(counts.tolist(), default=0)
    # a projection that no two different members share but by accident; what it makes of a gap is overwritten
    along = torch.arange(1, image_sets.shape[2] + 1, device=image_sets.device, dtype=image_sets.dtype).cos()
    keys = (image_sets.detach() @ along).nan_to_num().masked_fill(~mask, torch.inf)  # (B, n)
    order = keys.argsort(dim=1, stable=True)[:, :largest]  # (B, m)
    filled = torch.arange(largest, device=image_sets.device) < counts[:, None]
    sets = torch.arange(len(image_sets), device=image_sets.device)
    rows = image_sets.flatten(0, 1)[(order + sets[:, None] * image_sets.shape[1])[filled]]  # (N, d)
    return Sets(rows, counts.cumsum(0) - counts, sets.repeat_interleave(counts), order, filled)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """The layer in the precision of x, float32 at least: weights in half precision are widened."""
    return linear(x, layer.weight.to(x.dtype))
