"""Several embeddings of one thing become one, whatever their order and number (docs/theory.md, section 7)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from mmdiff.errors import InputError
from mmdiff.modalities.ragged import Sets, packed


class Fused(NamedTuple):
    """``embedding`` (B, d) or (B, tokens, d); ``weights`` (B, n), which add up to 1 and are 0 where no member is."""

    embedding: Tensor
    weights: Tensor


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
        InputError: for an empty set (on an accelerator: an assertion of the device), and for shapes that do not fit.
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
        sets = packed(image_sets.flatten(0, 1), mask.repeat_interleave(tokens, dim=0))
        scores = self._of_set(image_sets, mask, sets)
        fused, table = self.fuse(sets, scores)  # (B T, d), (B T, m)
        weights = sets.places(table, count).reshape(size, tokens, count).mean(dim=1)  # (B, n)
        return Fused(fused.reshape(size, *members.shape[2:]).to(members.dtype), weights)

    @abstractmethod
    def fuse(self, sets: Sets, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """(embeddings (B, d), weights (B, m)) of B sets; ``scores`` (N,): `set_scores` of the rows."""

    def set_scores(self, wholes: Sets) -> Tensor | None:
        """What the set says of each member as a whole, the mean of its tokens: a score (N,), or None."""
        return None

    def _of_set(self, image_sets: Tensor, mask: Tensor, sets: Sets) -> Tensor | None:
        """`set_scores` of members (B, T, n, d) for the rows of their token sets."""
        size, tokens, count, _ = image_sets.shape
        wholes = sets if tokens == 1 else packed(image_sets.mean(dim=1), mask)
        scores = self.set_scores(wholes)
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


class Weighted(Fusion):
    """Σ_k a_k h_k with a = softmax_k of a score of each member, and of what the set says of it."""

    def fuse(self, sets: Sets, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        own = self.score(sets.rows).to(sets.rows.dtype)  # (N,); autocast may have narrowed them
        total = own if scores is None else own + scores.to(own.dtype)
        weights = self.gated(sets.table(total, gap=-torch.inf).softmax(dim=1), sets)  # (B, m)
        return sets.sums(sets.rows, sets.flat(weights)), weights

    def gated(self, weights: Tensor, sets: Sets) -> Tensor:
        """The weights (B, m) as they are used."""
        return weights

    def score(self, members: Tensor) -> Tensor:
        """(N, d) -> (N,): what each member says of itself; nothing by default."""
        return members.new_zeros(len(members))


class Mean(Weighted):
    """Eq. (14), left: Σ h_k / n; the weights are 1 / n."""


class Max(Fusion):
    """Eq. (14), right: the largest of every feature; the weights are the shares of features that members win.

    Members that tie for a feature share it evenly, and so they share its gradient. The weights have none.
    """

    def fuse(self, sets: Sets, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        members = sets.flat(sets.filled)[:, None]  # (N, 1), false in gaps
        rows = sets.rows.masked_fill(~members, -torch.inf)
        lowest = rows.new_full((len(sets.filled), self.dim), -torch.inf)
        owners = sets.owners[:, None].expand_as(rows)  # (N, d)
        largest = lowest.scatter_reduce(0, owners, rows, "amax")  # (B, d)
        with torch.no_grad():
            wins = ((rows == largest[sets.owners]) & members).to(largest.dtype)  # (N, d)
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


class ValueGatedAttention(Attention):
    """Eq. (17): the a of Eq. (15), each times sigmoid(eᵍ (n a_k − 1)), add up to 1 again.

    The gate raises weights above 1/n and lowers weights below it; g is learned and starts at 0.
    """

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__(dim, hidden)
        self.g = nn.Parameter(torch.zeros(()))

    def gated(self, weights: Tensor, sets: Sets) -> Tensor:
        counts = sets.filled.sum(dim=1, keepdim=True)
        raised = weights * (self.g.to(weights.dtype).exp() * (counts * weights - 1)).sigmoid()
        return raised / raised.sum(dim=1, keepdim=True)


class PerFeatureAttention(Fusion):
    """Eq. (18): every feature has its own softmax over members, a = softmax_k( vⱼᵀ tanh(V h_k) ) of feature j.

    The weights are means over the features; `feature_weights` has all of them.
    """

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__(dim, hidden)
        self.V, self.v = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def fuse(self, sets: Sets, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        weights = self._weights(sets)  # (N, d)
        return sets.sums(sets.rows * weights), sets.table(weights.mean(dim=1), gap=0.0)

    def feature_weights(self, members: Tensor, mask: Tensor) -> Tensor:
        """(B, n, d) and a mask (B, n) -> the weight of every feature of every member (B, n, d), 0 in gaps."""
        self._check(members, mask)
        sets = packed(members.to(torch.promote_types(members.dtype, torch.float32)), mask)
        columns = [sets.places(sets.table(one, gap=0.0), mask.shape[1]) for one in self._weights(sets).unbind(1)]
        return torch.stack(columns, dim=2)

    def _weights(self, sets: Sets) -> Tensor:
        members = sets.flat(sets.filled)[:, None]
        scores = _linear(_linear(sets.rows, self.V).tanh(), self.v).to(sets.rows.dtype)  # (N, d)
        scores = scores.masked_fill(~members, -torch.inf)
        owners, lowest = (
            sets.owners[:, None].expand_as(scores),
            scores.new_full((len(sets.filled), self.dim), -torch.inf),
        )
        with torch.no_grad():  # a shift, which a softmax ignores
            largest = lowest.scatter_reduce(0, owners, scores, "amax")[sets.owners]
        shares = (scores - largest).exp()
        return shares / sets.sums(shares)[sets.owners]


class AgreementAttention(Attention):
    """Eq. (19): a = softmax_k( vᵀ tanh(V h_k) + τ · (1/n) Σ_j cos(h_k, h_j) ), τ = eˢ, which starts at 10.

    The term of j = k is 1/n for every member, which the softmax ignores: what counts is the agreement with the others.
    With tokens, members agree as wholes: by the means of their tokens.
    """

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__(dim, hidden)
        self.s = nn.Parameter(torch.tensor(10.0).log())

    def set_scores(self, wholes: Sets) -> Tensor:
        directions = normalize(wholes.rows, dim=1)  # (N, d); 0 in gaps
        means = wholes.sums(directions) / wholes.filled.sum(dim=1, keepdim=True)  # (B, d)
        agreement = (directions * means[wholes.owners]).sum(dim=1)  # (N,)
        return self.s.to(agreement.dtype).exp() * agreement


class GeometricMedian(Weighted):
    """Eq. (20): argmin_m Σ_k ‖h_k − m‖ by eight steps of Weiszfeld; nothing is learned.

    A step is m = Σ_k a_k h_k with a_k ∝ 1 / √(‖h_k − m‖² + 10⁻³ · their mean). With tokens, the members are the means
    of their tokens.
    """

    STEPS, SOFTNESS = 8, 1e-3

    def set_scores(self, wholes: Sets) -> Tensor:
        rows, counts = wholes.rows, wholes.filled.sum(dim=1, keepdim=True)
        weights = wholes.flat((wholes.filled / counts).to(rows.dtype))  # (N,)
        for _ in range(self.STEPS):
            middle = wholes.sums(rows, weights)  # (B, d)
            squares = wholes.table((rows - middle[wholes.owners]).square().sum(dim=1), gap=0.0)  # (B, m)
            softness = self.SOFTNESS * squares.sum(dim=1, keepdim=True) / counts
            tiny = torch.finfo(rows.dtype).tiny  # members that are all equal
            scores = -0.5 * (squares + softness + tiny).log().masked_fill(~wholes.filled, torch.inf)
            weights = wholes.flat(scores.softmax(dim=1))
        return wholes.flat(scores.masked_fill(~wholes.filled, 0.0))


FUSIONS: dict[str, type[Fusion]] = {
    "mean": Mean,
    "max": Max,
    "attention": Attention,
    "gated_attention": GatedAttention,
    "value_gated_attention": ValueGatedAttention,
    "per_feature_attention": PerFeatureAttention,
    "agreement_attention": AgreementAttention,
    "geometric_median": GeometricMedian,
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


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """The layer in the precision of x, float32 at least: weights in half precision are widened."""
    return linear(x, layer.weight.to(x.dtype))
