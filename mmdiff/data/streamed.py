"""Rows of shards that are read when they are needed: nothing is copied, and little is kept."""

from __future__ import annotations

import copy
import hashlib
import os
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, Self

import datasets
from pandas.errors import EmptyDataError

from mmdiff.data.files import ROW, undecoded_features
from mmdiff.data.shards import SHARDS, Block, Shard
from mmdiff.errors import InputError

FIRST = 1000  # rows that settings are read off
_READS = "parquet, arrow and tar shards and folders of images are streamed"
_THREADS = 16  # that open shards


def open_streamed(streams: int, path: str, **arguments: Any) -> dict[str, StreamedRows]:
    """{split: rows} of what `datasets.load_dataset` would read.

    Args:
        streams: as of `StreamedRows`.
        path, arguments: as of `datasets.load_dataset`; local, or on the hub.

    Raises:
        InputError: for another kind of file than shards, and for a shard that is broken.
        EmptyDataError: there is no row at all.
    """
    builder = datasets.load_dataset_builder(path, **arguments)
    kind = type(builder).__module__.removeprefix("datasets.packaged_modules.").split(".")[0]
    if kind not in SHARDS:
        remedy = f"but {_READS}, not {kind}; on the hub data.options.revision=refs/convert/parquet is parquet"
        raise InputError("data.streaming", True, remedy)
    with ThreadPoolExecutor(_THREADS) as pool:  # before `datasets` looks into one
        shards = {
            str(split): list(pool.map(SHARDS[kind], map(str, files), _names(list(map(str, files)))))
            for split, files in builder.config.data_files.items()
        }
    if not any(sum(shard.blocks) for files in shards.values() for shard in files):
        raise EmptyDataError("no rows")
    builder.as_streaming_dataset()  # reads the features off the first file
    return {split: StreamedRows(files, builder.info.features, split, streams) for split, files in shards.items()}


def _names(paths: Sequence[str]) -> list[str]:
    """Paths without the folder that all of them share."""
    shared = os.path.commonprefix([path.rpartition("/")[0] + "/" for path in paths]).rpartition("/")[0]
    return [path.removeprefix(f"{shared}/") for path in paths]


class Rest(Sequence):
    """The numbers below ``count`` without every ``step``-th, as a sequence that needs no memory."""

    def __init__(self, count: int, step: int) -> None:
        self.count, self.step = count, step

    def __len__(self) -> int:
        return self.count - self.count // self.step

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return index + index // (self.step - 1)


class StreamedRows:
    """Rows of shards, with the part of the interface of `datasets.Dataset` that the package uses.

    Blocks stay open until each of their rows was read, and at most ``streams`` + 1 of them per process: row groups of
    parquet files are in memory, arrow files are mapped, tars are open files. A process forgets what its parent read.

    Args:
        shards: the files.
        features: of their columns.
        split: its name.
        streams: as of `mmdiff.data.order.Order`.
    """

    def __init__(self, shards: Sequence[Shard], features: datasets.Features, split: str, streams: int) -> None:
        self.features, self.split = undecoded_features(features), split
        self._stored = self.features  # before any is converted
        self.column_names = [*self.features, ROW]
        self._files, self._most = list(shards), streams + 1
        firsts = [(shard, (0, *accumulate(shard.blocks))) for shard in self._files]  # rows before each block of a shard
        self._blocks = [(shard, block, first[block]) for shard, first in firsts for block in range(len(shard.blocks))]
        self._starts = [0, *accumulate(size for shard in self._files for size in shard.blocks)]  # of blocks
        self._chosen: Sequence[int] = range(self._starts[-1])
        self._convert: dict[str, Callable[[Any, str], Any]] = {}
        self._layout: list[list[int]] | None = None
        self._forget()

    def _forget(self) -> None:
        self._open: OrderedDict[int, Block] = OrderedDict()
        self._unread: dict[int, int] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_unread": {}, "_process": None}

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def shards(self) -> list[list[int]]:
        """Rows per block of every shard, see `mmdiff.data.order.Shards`."""
        if self._layout is None:
            ends = [bisect_left(self._chosen, start) for start in self._starts]
            sizes = iter([after - before for before, after in zip(ends, ends[1:])])
            layout = [[next(sizes) for _ in shard.blocks] for shard in self._files]
            self._layout = [blocks for blocks in ([size for size in shard if size] for shard in layout) if blocks]
        return self._layout

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self._chosen[index]
        place = bisect_right(self._starts, number) - 1
        within = number - self._starts[place]
        shard, _, first = self._blocks[place]
        row, name = dict(self._block(place)[within]), f"{first + within} of {shard.name}"
        self._count(place)
        for column in self._convert.keys() & row.keys():
            row[column] = self._convert[column](row[column], name)
        return {**row, ROW: name} if ROW in self.column_names else row

    def _block(self, place: int) -> Block:
        if self._process != os.getpid():
            self._forget()
        if place not in self._open:
            while len(self._open) >= self._most:
                self._unread.pop(self._open.popitem(last=False)[0])
            shard, block, _ = self._blocks[place]
            self._open[place] = shard.read(block, self._stored)
            first, last = (bisect_left(self._chosen, start) for start in self._starts[place : place + 2])
            self._unread[place] = last - first
        self._open.move_to_end(place)
        return self._open[place]

    def _count(self, place: int) -> None:
        """One more row of a block is read; after the last it is closed."""
        self._unread[place] -= 1
        if not self._unread[place]:
            del self._open[place], self._unread[place]

    def _with(self, **changes: Any) -> Self:
        chosen = copy.copy(self)
        chosen.__dict__ |= changes
        chosen._forget()
        return chosen

    def select(self, indices: Sequence[int]) -> Self:
        """Some of the rows, in the order of the data.

        Args:
            indices: that increase.
        """
        whole = self._chosen == range(self._starts[-1])
        return self._with(_chosen=indices if whole else [self._chosen[index] for index in indices], _layout=None)

    def select_columns(self, names: Sequence[str]) -> Self:
        """The same rows with some of the columns.

        Raises:
            InputError: for a shard that lacks one.
        """
        for shard in self._files:
            lacks = [name for name in names if name in self.features and name not in (shard.columns or names)]
            if lacks:
                raise InputError("data.source", shard.path, f"lacks the column {lacks[0]} that the first shard has")
        shown, stored = (
            datasets.Features({name: features[name] for name in names if name != ROW})
            for features in (self.features, self._stored)
        )
        return self._with(features=shown, _stored=stored, column_names=list(names))

    def converted(self, column: str, feature: Any, convert: Callable[[Any, str], Any]) -> Self:
        """The same rows with a column's values converted when they are read.

        Args:
            column: its name.
            feature: its type then.
            convert: (value, "<row> of <shard>") -> value.
        """
        features = datasets.Features({**self.features, column: feature})
        return self._with(_convert={**self._convert, column: convert}, features=features)

    def fingerprint(self) -> dict[str, Any]:
        """{"rows": their number, "columns": their names, "hash": of the shards' names, sizes, rows and digests}."""
        digest = hashlib.sha256()
        for shard in self._files:
            digest.update(f"{shard.name} {shard.size} {shard.blocks} {shard.digest}\n".encode())
        columns = sorted(set(self.column_names) - {ROW})
        return {"rows": len(self), "columns": columns, "hash": digest.hexdigest()[:16]}
