"""The fusions, Eq. (14)–(21): several embeddings of one thing become one (docs/theory.md, section 7)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from mmdiff.errors import InputError
from mmdiff.modalities.fusion_base import Fused, Fusion
from mmdiff.modalities.ragged import Sets, packed

__all__ = ["FUSIONS", "QUERY_FUSIONS", "Fused", "Fusion", "build_fusion"]


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

    def set_scores(self, wholes: Sets, query: Tensor | None) -> Tensor:
        directions = normalize(wholes.rows, dim=1)  # (N, d); 0 in gaps
        means = wholes.sums(directions) / wholes.filled.sum(dim=1, keepdim=True)  # (B, d)
        agreement = (directions * means[wholes.owners]).sum(dim=1)  # (N,)
        return self.s.to(agreement.dtype).exp() * agreement


class QueryAttention(Attention):
    """Eq. (21): a = softmax_k( (v + W q / √m)ᵀ tanh(V h_k) ), m = ``hidden``; a query of zeros gives Eq. (15).

    Scaled dot-product attention (Vaswani et al., 2017, 1706.03762) of one query to the keys of Ilse et al. (2018,
    1802.04712), whose learned v is a query for all sets. With tokens, the query scores members as wholes: by the means
    of their tokens.

    Args:
        dim, hidden: see `Fusion`.
        query_dim: q.
    """

    def __init__(self, dim: int, hidden: int = 128, query_dim: int = 0) -> None:
        super().__init__(dim, hidden)
        if query_dim < 1:
            raise InputError("query_dim", query_dim, "needs one number at least")
        self.query_dim, self.W = query_dim, nn.Linear(query_dim, hidden, bias=False)

    def set_scores(self, wholes: Sets, query: Tensor | None) -> Tensor:
        assert query is not None  # checked
        asked = _linear(query.to(wholes.rows.dtype), self.W)[wholes.owners]  # (N, hidden)
        return (_linear(wholes.rows, self.V).tanh() * asked).sum(dim=1) / math.sqrt(asked.shape[1])


class GeometricMedian(Weighted):
    """Eq. (20): argmin_m Σ_k ‖h_k − m‖ by eight steps of Weiszfeld; nothing is learned.

    A step is m = Σ_k a_k h_k with a_k ∝ 1 / √(‖h_k − m‖² + 10⁻³ · their mean). With tokens, the members are the means
    of their tokens.
    """

    STEPS, SOFTNESS = 8, 1e-3

    def set_scores(self, wholes: Sets, query: Tensor | None) -> Tensor:
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


#: Those that take a query.
QUERY_FUSIONS: dict[str, type[QueryAttention]] = {"query_attention": QueryAttention}


def build_fusion(kind: str, dim: int, hidden: int = 128, query_dim: int | None = None) -> Fusion:
    """A fusion by its name.

    Args:
        kind: a key of `FUSIONS`, or with ``query_dim`` of `QUERY_FUSIONS`.
        dim, hidden: see `Fusion`.
        query_dim: q of the queries; None: there are none.

    Raises:
        InputError: for an unknown name, a width below 1, or a kind that needs a query and has none.
    """
    if query_dim is None and kind in QUERY_FUSIONS:
        raise InputError("query", None, f"{kind} needs one")
    known = FUSIONS if query_dim is None else QUERY_FUSIONS
    if kind not in known:
        where = "" if query_dim is None else "with a query "
        raise InputError("fusion", kind, f"{where}choose one of {', '.join(known)}")
    return FUSIONS[kind](dim, hidden) if query_dim is None else QUERY_FUSIONS[kind](dim, hidden, query_dim)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """The layer in the precision of x, float32 at least: weights in half precision are widened."""
    return linear(x, layer.weight.to(x.dtype))
