"""The order of the data is a function of (seed, position), however the work is split."""

from __future__ import annotations

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
