"""Shards: files of rows that are read where they lie, a block of rows at a time."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import InMemoryTable, table_cast

from mmdiff.data import tars
from mmdiff.data.opening import is_local, opened, readable
from mmdiff.errors import InputError

LARGEST_BLOCK = 2**30  # bytes of a row group, which is read whole
_CHUNKS, _CHUNK = 16, 4096  # of a local file, that its digest holds

Block = Sequence[dict[str, Any]]  # rows


class Shard(ABC):
    """One file of rows; pickled without what it has read.

    Args:
        path: local, or a URL of fsspec such as ``hf://datasets/user/name@commit/file.parquet``.
        name: for errors and fingerprints: the path without the folder that all shards share.
    """

    #: rows of every block
    blocks: list[int]
    #: columns that every row has; None: known only when a row is read
    columns: list[str] | None = None
    #: hash of the metadata, and of some of a local file's content
    digest: str

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = path, name
        with readable(path):
            with opened(path) as file:
                self.size = file.seek(0, 2)
            digest = hashlib.sha256(self.index())
            if is_local(path):
                digest.update(_content(Path(path), self.size))
        self.digest = digest.hexdigest()[:16]

    @abstractmethod
    def index(self) -> bytes:
        """Set `blocks`; the metadata that belong into the digest."""

    @abstractmethod
    def read(self, block: int, features: datasets.Features) -> Block:
        """The rows of a block, with the columns of ``features`` alone."""


class ParquetShard(Shard):
    """A parquet file; its blocks are its row groups."""

    def index(self) -> bytes:
        with opened(self.path) as file:
            parquet = pq.ParquetFile(file)
            metadata, self.columns = parquet.metadata, parquet.schema_arrow.names
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            file.seek(-8 - metadata.serialized_size, 2)
            footer = file.read()
        self.blocks = [group.num_rows for group in groups]
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > LARGEST_BLOCK:
            remedy = f"has a row group of {largest / 2**30:.1f} GiB, which is read whole; write it in smaller ones"
            raise InputError("data.source", self.path, remedy)
        return footer

    def read(self, block: int, features: datasets.Features) -> Block:
        with readable(self.path, f"row group {block} "), opened(self.path) as file:
            table = pq.ParquetFile(file).read_row_group(block, columns=list(features), use_threads=False)
            return _rows(table, features)


class ArrowShard(Shard):
    """A local arrow file or stream, memory-mapped; it is one block."""

    def index(self) -> bytes:
        table = self._table()
        table.validate(full=True)  # offsets of a broken file would lead out of it
        self.blocks, self.columns = [table.num_rows], table.schema.names
        return table.schema.serialize().to_pybytes()

    def _table(self) -> pa.Table:
        source = pa.memory_map(self.path)
        try:
            return pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(source).read_all()

    def read(self, block: int, features: datasets.Features) -> Block:
        with readable(self.path):
            return _rows(self._table(), features)


class TarShard(Shard):
    """A WebDataset tar; it is one block, whose members are read at their offsets."""

    def index(self) -> bytes:
        self._index = tars.index(self.path, self.size)
        self.blocks = [self._index.num_rows]
        return self._index.digest

    def read(self, block: int, features: datasets.Features) -> Block:
        with readable(self.path):
            return tars.TarRows(self.path, self._index.load(), features)


#: {builder of `datasets`: kind of shard}
SHARDS: dict[str, type[Shard]] = {"parquet": ParquetShard, "arrow": ArrowShard, "webdataset": TarShard}


def _rows(table: pa.Table, features: datasets.Features) -> Block:
    """A table as rows, formatted as those of any data set."""
    table = table.select(list(features))
    table = table if table.schema == features.arrow_schema else table_cast(table, features.arrow_schema)
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(InMemoryTable(table), info, fingerprint="block")  # type: ignore[return-value]


def _content(file: Path, size: int) -> bytes:
    """Evenly spaced chunks."""
    with file.open("rb") as opened_file:
        chunks = []
        for index in range(_CHUNKS):
            opened_file.seek(max(0, size - _CHUNK) * index // (_CHUNKS - 1))
            chunks.append(opened_file.read(_CHUNK))
    return b"".join(chunks)
