"""Buckets of aspect ratio and size: a global batch has one shape, and which one is a function of (seed, step)."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mmdiff.data.order import Order

Size = tuple[int, int]  # height, width


class Reader(NamedTuple):
    """How rows become values of one size: ``preprocess`` and ``placeholders`` as of `mmdiff.data.table.Table`."""

    preprocess: Mapping[str, Callable[[object], Tensor]]
    placeholders: Mapping[str, Tensor]


class Buckets(NamedTuple):
    """``sizes`` of the buckets, the ``readers`` of rows at these sizes, and ``of_rows`` (rows,): each row's bucket."""

    sizes: Sequence[Size]
    readers: Sequence[Reader]
    of_rows: np.ndarray

    @property
    def counts(self) -> list[int]:
        """How many rows each bucket has."""
        return np.bincount(self.of_rows, minlength=len(self.sizes)).tolist()

    def reader(self, rows: Sequence[int]) -> Reader:
        """Of rows of one bucket."""
        (bucket,) = set(self.of_rows[list(rows)].tolist())
        return self.readers[bucket]


def generated_sizes(base: Size, multiple: Size, ratio: float) -> list[Size]:
    """All sizes of about the base's area, of which the longer side is at most ``ratio`` times the shorter one.

    For every height the largest width that keeps the number of pixels within the base's (NovelAI's aspect ratio
    bucketing, 2022), and the same with the two exchanged.

    Args:
        base: of the model.
        multiple: of heights and widths.
        ratio: 1 or more.
    """
    area, sizes = base[0] * base[1], {base}
    for side in (0, 1):
        step, across = multiple[side], multiple[1 - side]
        for long in range(step, area // across + 1, step):
            short = area // long // across * across
            sizes.add((long, short) if side == 0 else (short, long))
    widest = {max((s for s in sizes if s[0] == height), key=lambda s: s[1]) for height in {s[0] for s in sizes}}
    tallest = {max(s for s in sizes if s[1] == width) for width in {s[1] for s in sizes}}
    return sorted({base} | {size for size in widest & tallest if max(size) <= ratio * min(size)})


def nearest(sizes: Sequence[Size], size: Size) -> int:
    """The bucket of the nearest aspect ratio; of several the largest that the image covers, or else the smallest."""

    def distance(index: int) -> tuple[float, bool, int]:
        (height, width), (rows, columns) = sizes[index], size
        aspect = abs(math.log(height * columns / (width * rows)))
        covered = rows >= height and columns >= width
        return round(aspect, 9), not covered, -height * width if covered else height * width

    return min(range(len(sizes)), key=distance)


class BucketOrder:
    """An endless sequence of rows in which every global batch is of one bucket.

    An epoch walks through all rows in the order that it has without buckets. Each row joins the queue of its bucket. A
    queue as long as a batch is the next batch. What is left in the queues at the end comes first in the next epoch: no
    row is dropped, and a bucket's n rows are seen once in every n places of its batches. Rows of several streams are
    sorted within their batch, so that a process that reads a part of it finds neighbours in few blocks.

    Args:
        order: of all rows.
        of_rows: (rows,), each row's bucket.
        batch_size: the global one.
    """

    def __init__(self, order: Order, of_rows: np.ndarray, batch_size: int) -> None:
        self.order, self.of_rows, self.batch_size = order, of_rows, batch_size
        self.counts = np.bincount(of_rows)
        self._epoch, self._first = -1, 0
        self._batches: list[np.ndarray] = []
        self._left: list[np.ndarray] = []

    def row(self, index: int) -> int:
        """The row at a global sample index 0, 1, 2, …"""
        step, place = divmod(index, self.batch_size)
        if not self._first <= step < self._first + len(self._batches):
            self._walk(self._epoch_of(step))
        return int(self._batches[step - self._first][place])

    def _first_step(self, epoch: int) -> int:
        """How many batches are full before an epoch."""
        return int((epoch * self.counts // self.batch_size).sum())

    def _epoch_of(self, step: int) -> int:
        """The epoch that fills the batch of a step."""
        most = (step + 1 + len(self.counts)) * self.batch_size // int(self.counts.sum()) + 2
        return bisect.bisect_right(range(most + 1), step, key=self._first_step) - 1

    def _walk(self, epoch: int) -> None:
        """The batches of an epoch, and what is left after it."""
        left = self._left if epoch == self._epoch + 1 and self._left else self._left_before(epoch)
        rows = self.order.rows(epoch)
        buckets = self.of_rows[rows]
        full: list[tuple[int, np.ndarray]] = []
        self._left = []
        for bucket, queue in enumerate(left):
            places = np.flatnonzero(buckets == bucket)
            queued, count = np.concatenate([queue, rows[places]]), (len(queue) + len(places)) // self.batch_size
            ends = range(self.batch_size, (count + 1) * self.batch_size, self.batch_size)
            full += [(int(places[end - 1 - len(queue)]), queued[end - self.batch_size : end]) for end in ends]
            self._left.append(queued[count * self.batch_size :])
        self._epoch, self._first = epoch, self._first_step(epoch)
        batches = [batch for _, batch in sorted(full, key=lambda entry: entry[0])]
        self._batches = [np.sort(batch) for batch in batches] if self.order.streams > 1 else batches

    def _left_before(self, epoch: int) -> list[np.ndarray]:
        """What the epochs before have left in the queues: the last rows of each bucket."""
        lengths = epoch * self.counts % self.batch_size
        left = [np.empty(0, dtype=np.int64) for _ in lengths]
        while any(len(queue) < length for queue, length in zip(left, lengths, strict=True)):
            epoch -= 1
            rows = self.order.rows(epoch)
            for bucket, length in enumerate(lengths):
                missing = int(length) - len(left[bucket])
                if missing:
                    left[bucket] = np.concatenate([rows[self.of_rows[rows] == bucket][-missing:], left[bucket]])
        return left
