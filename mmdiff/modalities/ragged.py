"""Sets of different sizes in one batch: their members without the gaps, or with gaps that count 0."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class Sets(NamedTuple):
    """The members of B sets, one set after another, each in an order that its values decide.

    A sum over a set then comes out the same wherever its members stood. On a CPU the rows have no gaps, so that padding
    changes no bit. Elsewhere, and under `torch.compile`, every place keeps its row, and gaps hold 0: the shapes follow
    from the input's alone, so that the host waits for nothing.

    ``rows`` (N, d); ``owners`` (N,) the set of each row; ``order`` (B, m) the place that each member came from, where
    ``filled`` (B, m) is true; ``starts`` (B,) of each set in the rows, or None where gaps are kept (N = B · m).
    """

    rows: Tensor
    owners: Tensor
    order: Tensor
    filled: Tensor
    starts: Tensor | None

    def table(self, numbers: Tensor, gap: float) -> Tensor:
        """One number per row (N,) -> (B, m), ``gap`` where no member is."""
        if self.starts is None:
            return numbers.reshape(self.filled.shape).masked_fill(~self.filled, gap)
        return numbers.new_full(self.filled.shape, gap).masked_scatter(self.filled, numbers)

    def flat(self, table: Tensor) -> Tensor:
        """(B, m) -> (N,), one number per row."""
        return table.flatten() if self.starts is None else table[self.filled]

    def places(self, table: Tensor, size: int) -> Tensor:
        """Numbers (B, m) -> (B, size), each in the place that its member came from."""
        return table.new_zeros(len(table), size).scatter(1, self.order, table)

    def sums(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Σ over each set of rows (N, k), weighted by (N,): (B, k). Rows or weights of gaps must be 0."""
        if self.starts is None:
            weighted = rows if weights is None else rows * weights[:, None]
            return weighted.reshape(*self.filled.shape, -1).sum(dim=1)
        every = torch.arange(len(rows), device=rows.device)
        return embedding_bag(every, rows, self.starts, mode="sum", per_sample_weights=weights)


def packed(members: Tensor, mask: Tensor) -> Sets:
    """Members (B, n, d) and their mask (B, n), true where a member is; gaps may hold anything."""
    counts, sets = mask.sum(dim=1), torch.arange(len(members), device=members.device)  # (B,)
    # a projection that no two different members share but by accident; what it makes of a gap is overwritten
    along = torch.arange(1, members.shape[2] + 1, device=members.device, dtype=members.dtype).cos()
    keys = (members.detach() @ along).nan_to_num().masked_fill(~mask, torch.inf)  # (B, n)
    order = keys.argsort(dim=1, stable=True)  # (B, n)
    if members.device.type != "cpu" or torch.compiler.is_compiling():
        filled = mask.gather(1, order)
        rows = members.gather(1, order[..., None].expand_as(members)).masked_fill(~filled[..., None], 0.0)
        return Sets(rows.flatten(0, 1), sets.repeat_interleave(mask.shape[1]), order, filled, None)
    order = order[:, : max(counts.tolist(), default=0)]  # (B, m)
    filled = torch.arange(order.shape[1]) < counts[:, None]
    rows = members.flatten(0, 1)[(order + sets[:, None] * members.shape[1])[filled]]  # (N, d)
    return Sets(rows, sets.repeat_interleave(counts), order, filled, counts.cumsum(0) - counts)
