"""The order of the data is a function of (seed, position), however the work is split."""

from __future__ import annotations

import random

import torch

from mmdiff.data import Order
from mmdiff.data.order import MicroBatches, Visit

ROWS = 31
GLOBAL = 12


def batches(first: int, last: int, parts: int = 1, rank: int = 0, world: int = 1, seed: int = 0) -> list[list[Visit]]:
    return list(MicroBatches(Order(ROWS, seed), first, last, GLOBAL, parts, rank, world))


def test_every_epoch_is_another_permutation() -> None:
    order = Order(ROWS, seed=5)
    epochs = [[order.row(epoch * ROWS + place) for place in range(ROWS)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != [Order(ROWS, seed=6).row(place) for place in range(ROWS)]


def test_a_row_depends_on_nothing_asked_before() -> None:
    indices = [100, 3, 64, 3, 0, 93, 62, 31, 30, 100]
    order = Order(ROWS, seed=1)
    assert [order.row(index) for index in indices] == [Order(ROWS, seed=1).row(index) for index in indices]


def test_processes_and_parts_share_the_global_batch_out() -> None:
    """In the order of their positions the shares are the batch of one process; no position is taken twice."""
    for world, parts in [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2)]:
        whole = batches(0, 5)
        ranks = [batches(0, 5, parts, rank, world) for rank in range(world)]
        for step in range(5):
            shares = [ranks[rank][step * parts + part] for part in range(parts) for rank in range(world)]
            assert [visit for share in shares for visit in share] == whole[step]
        samplers = [MicroBatches(Order(ROWS, 0), 0, 1, GLOBAL, parts, rank, world) for rank in range(world)]
        positions = [p for sampler in samplers for part in range(parts) for p in sampler.positions(part)]
        assert sorted(positions) == list(range(GLOBAL))
        assert all(len(rank) == 5 * parts for rank in ranks) and len(samplers[0]) == parts


def test_starting_late_is_skipping() -> None:
    for start in [1, 3, 6]:
        assert batches(start, 7, parts=2) == batches(0, 7, parts=2)[2 * start :]


def test_one_epoch_sees_every_row_once_across_batches() -> None:
    visits = [visit for batch in batches(0, ROWS) for visit in batch]  # ROWS batches are GLOBAL epochs
    rows = [visit.row for visit in visits]
    assert sorted(rows) == sorted(list(range(ROWS)) * GLOBAL)
    assert sorted(rows[:ROWS]) == list(range(ROWS))
    assert [visit.sample for visit in visits] == list(range(ROWS * GLOBAL))  # no two visits have one number


UNEVEN = [[5, 5, 3], [7], [5, 5, 5, 5, 2], [5, 4], [1], [5] * 6, [8, 8]]  # rows per block of every shard


def readers(streams: int, world: int, pieces: int, epochs: int) -> list[set[int]]:
    """The blocks that every process and worker reads."""
    order = Order(UNEVEN, 3, streams, GLOBAL)
    steps = order.num_rows * epochs // GLOBAL
    read: list[set[int]] = []
    for rank in range(world):
        batches = list(MicroBatches(order, 0, steps, GLOBAL, 1, rank, world, pieces))
        for worker in range(pieces):
            rows = [visit.row for batch in batches[worker::pieces] for visit in batch]
            read.append({int(i) for i in order.starts.searchsorted(rows, side="right") - 1})
    return read


def test_every_epoch_sees_every_row_of_uneven_shards_once() -> None:
    draw = random.Random(0)
    for _ in range(60):
        shards = [[draw.randint(1, 9) for _ in range(draw.randint(1, 4))] for _ in range(draw.randint(1, 8))]
        batch, streams = draw.choice([1, 4, 6, 12, 16, 40]), draw.choice([1, 2, 4, 8, 32])
        order = Order(shards, 3, streams, batch)
        rows = [[order.row(epoch * order.num_rows + i) for i in range(order.num_rows)] for epoch in range(3)]
        assert all(sorted(epoch) == list(range(order.num_rows)) for epoch in rows), (shards, batch, streams)
        index = draw.randrange(3 * order.num_rows)
        assert Order(shards, 3, streams, batch).row(index) == [row for epoch in rows for row in epoch][index]


def test_one_block_in_one_stream_has_the_order_of_rows_in_memory() -> None:
    assert [Order([[ROWS]], 5, 8, GLOBAL).row(i) for i in range(90)] == [Order(ROWS, 5).row(i) for i in range(90)]


def test_blocks_are_read_one_after_the_other_and_by_few_readers() -> None:
    """Of four streams, two processes with two workers each read one: a block is read twice only where a cut is."""
    blocks = len(Order(UNEVEN, 0).sizes)
    assert sum(map(len, readers(4, 2, 2, epochs=1))) <= blocks + 3 + 4  # cuts, and those that end the last batch
    order = Order(UNEVEN, 3, 4, GLOBAL)
    for stream in range(4):
        rows = [order.row(step * GLOBAL + stream * 3 + k) for step in range(order.num_rows // GLOBAL) for k in range(3)]
        seen = torch.unique_consecutive(torch.as_tensor(order.starts.searchsorted(rows, side="right")))
        assert len(seen) == len(set(seen.tolist()))


def test_pieces_are_the_batch() -> None:
    for world, parts, pieces in [(1, 1, 4), (2, 1, 3), (2, 3, 2)]:
        for rank in range(world):
            whole = MicroBatches(Order(UNEVEN, 1, 4, GLOBAL), 2, 5, GLOBAL, parts, rank, world)
            dealt = MicroBatches(Order(UNEVEN, 1, 4, GLOBAL), 2, 5, GLOBAL, parts, rank, world, pieces)
            assert [v for batch in dealt for v in batch] == [v for batch in whole for v in batch]
            assert len(list(dealt)) == len(dealt) == pieces * len(whole)
