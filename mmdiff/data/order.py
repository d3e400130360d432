"""The order of the data as a pure function of (seed, position), so that a resumed run continues without a search."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from mmdiff.randomness import fold


class Order:
    """An endless sequence of rows: every epoch is a permutation, drawn from (seed, epoch).

    Args:
        num_rows: rows of the data set.
        seed: of the run.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows, self.seed = num_rows, seed
        self._epoch: int | None = None
        self._permutation: list[int] = []

    def row(self, index: int) -> int:
        """The row at a global sample index 0, 1, 2, …"""
        epoch, place = divmod(index, self.num_rows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(fold(self.seed, epoch, "order"))
            self._epoch, self._permutation = epoch, torch.randperm(self.num_rows, generator=generator).tolist()
        return self._permutation[place]


class Visit(NamedTuple):
    """A row and its sample number in the run, from which its random hole is drawn."""

    row: int
    sample: int


class MicroBatches:
    """Batch sampler of one process: the rows of every micro-batch from ``first_step`` on.

    In step s, part m, process r takes the positions m · world · size + r · size + (0 … size − 1) of the global batch,
    which starts at sample s · global_batch.

    Args:
        order: of the data.
        first_step, last_step: the half-open range of steps still to take.
        global_batch, parts, rank, world: the global batch is parts × world × size.
    """

    def __init__(
        self, order: Order, first_step: int, last_step: int, global_batch: int, parts: int, rank: int, world: int
    ) -> None:
        self.order, self.steps = order, range(first_step, last_step)
        self.global_batch, self.parts, self.rank, self.world = global_batch, parts, rank, world

    def positions(self, part: int) -> range:
        """Positions in the global batch of this process's share of a part."""
        size = self.global_batch // (self.parts * self.world)
        start = (part * self.world + self.rank) * size
        return range(start, start + size)

    def __iter__(self) -> Iterator[list[Visit]]:
        for step in self.steps:
            for part in range(self.parts):
                samples = (step * self.global_batch + position for position in self.positions(part))
                yield [Visit(self.order.row(sample), sample) for sample in samples]

    def __len__(self) -> int:
        return len(self.steps) * self.parts
