"""The order of the data as a pure function of (seed, position), so that a resumed run continues without a search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from mmdiff.randomness import fold

#: Rows of every block of every shard. Rows of a block are read together: a row group of a parquet file, a whole tar.
Shards = Sequence[Sequence[int]]
_NOTHING: tuple[int, int, int, list[int]] = (-1, 0, 0, [])  # epoch, first and last place, rows of a block


class Order:
    """An endless sequence of rows: every epoch sees every row once.

    The shards of an epoch are shuffled, the blocks of a shard and the rows of a block too, each from (seed, epoch).
    The sequence that results is cut into as many streams as the epoch takes places of the global batch: stream c has
    the places c · k … c · k + k − 1, k = batch_size / streams. So a process that reads a part of the global batch
    reads a part of the streams, and opens their shards alone. (Canonical nodes of MosaicML Streaming,
    https://docs.mosaicml.com/projects/streaming/, cut by rows instead of shards: no row is dropped or repeated.)

    One block and one stream are a permutation of all rows.

    Args:
        shards: rows per block of every shard; a number is one block of so many rows. Rows are numbered through.
        seed: of the run.
        streams: at most so many; as many as divide the batch and have a block each.
        batch_size: the global one.
    """

    def __init__(self, shards: int | Shards, seed: int, streams: int = 1, batch_size: int = 1) -> None:
        self.shards: Shards = [[shards]] if isinstance(shards, int) else [list(shard) for shard in shards]
        self.sizes = np.array([size for shard in self.shards for size in shard], dtype=np.int64)  # per block
        self.starts, self.num_rows = np.cumsum(self.sizes) - self.sizes, int(self.sizes.sum())
        self.seed, self.batch_size = seed, batch_size
        most = max(1, min(streams, len(self.sizes), batch_size))
        self.streams = max(count for count in range(1, most + 1) if batch_size % count == 0)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._read: dict[int, tuple[int, int, int, list[int]]] = {}

    def row(self, index: int) -> int:
        """The row at a global sample index 0, 1, 2, …"""
        epoch, place = divmod(index, self.num_rows)
        stream = 0
        if self.streams > 1:
            width = self.batch_size // self.streams
            stream, first = index % self.batch_size // width, epoch * self.num_rows
            place = self._before(first + self.num_rows, stream * width) - self._before(first, stream * width)
            place += self._taken(index, stream) - self._taken(first, stream)
        epoch_read, begin, end, rows = self._read.get(stream, _NOTHING)
        if epoch_read != epoch or not begin <= place < end:
            begin, rows = self._block(epoch, place)
            self._read[stream] = epoch, begin, begin + len(rows), rows
        return rows[place - begin]

    def _before(self, samples: int, width: int) -> int:
        """How many of the first samples of the run lie in the first ``width`` places of their batch."""
        batches, rest = divmod(samples, self.batch_size)
        return batches * width + min(rest, width)

    def _taken(self, samples: int, stream: int) -> int:
        """How many of the first samples of the run a stream has given."""
        width = self.batch_size // self.streams
        return self._before(samples, (stream + 1) * width) - self._before(samples, stream * width)

    def _block(self, epoch: int, place: int) -> tuple[int, list[int]]:
        """(first place, rows in their order) of the block at a place of an epoch's sequence."""
        blocks, ends = self._sequence(epoch)
        at = int(np.searchsorted(ends, place, side="right"))
        block = int(blocks[at])
        rows = self._shuffled(epoch, "order" if len(self.sizes) == 1 else f"order/{block}", int(self.sizes[block]))
        return int(ends[at] - self.sizes[block]), (rows + int(self.starts[block])).tolist()

    def rows(self, epoch: int) -> np.ndarray:
        """All rows of an epoch in the order in which it gives them."""
        samples = range(epoch * self.num_rows, (epoch + 1) * self.num_rows)
        return np.fromiter(map(self.row, samples), np.int64, self.num_rows)

    def _sequence(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(blocks in their order, the place where each of them ends) in an epoch."""
        if epoch not in self._epochs:
            firsts = [0, *accumulate(len(shard) for shard in self.shards)]
            order = self._shuffled(epoch, "shards", len(self.shards)).tolist()
            shuffled = [self._shuffled(epoch, f"blocks/{s}", len(self.shards[s])).numpy() + firsts[s] for s in order]
            blocks = np.concatenate(shuffled)
            self._epochs = {e: kept for e, kept in self._epochs.items() if e == epoch - 1}  # streams cross one by one
            self._epochs[epoch] = blocks, np.cumsum(self.sizes[blocks])
        return self._epochs[epoch]

    def _shuffled(self, epoch: int, name: str, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(fold(self.seed, epoch, name))
        return torch.randperm(count, generator=generator)


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
        pieces: a micro-batch comes in so many pieces, one after the other. A data loader deals them to its workers in
            turn, so that each worker reads streams of its own; ``size`` must be a multiple.
    """

    def __init__(
        self,
        order: Order,
        first_step: int,
        last_step: int,
        global_batch: int,
        parts: int,
        rank: int,
        world: int,
        pieces: int = 1,
    ) -> None:
        self.order, self.steps = order, range(first_step, last_step)
        self.global_batch, self.parts, self.rank, self.world = global_batch, parts, rank, world
        self.pieces = pieces

    def positions(self, part: int) -> range:
        """Positions in the global batch of this process's share of a part."""
        size = self.global_batch // (self.parts * self.world)
        start = (part * self.world + self.rank) * size
        return range(start, start + size)

    def __iter__(self) -> Iterator[list[Visit]]:
        for step in self.steps:
            for part in range(self.parts):
                samples = [step * self.global_batch + position for position in self.positions(part)]
                size = len(samples) // self.pieces
                for start in range(0, len(samples), size):
                    yield [Visit(self.order.row(sample), sample) for sample in samples[start : start + size]]

    def __len__(self) -> int:
        return len(self.steps) * self.parts * self.pieces
