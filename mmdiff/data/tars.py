"""WebDataset tars: an index of the members, made in one pass over the headers and cached, and rows read by offset."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext

from mmdiff.data.opening import cache_file, is_local, opened, readable, written
from mmdiff.data.source_checks import check_member
from mmdiff.errors import InputError

LARGEST_MEMBER = 2**30  # bytes
_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "fields": pa.list_(pa.string()),
        "offsets": pa.list_(pa.int64()),
        "sizes": pa.list_(pa.int64()),
    }
)


class Index(NamedTuple):
    """Of a tar: its rows, and a hash of the names, offsets and sizes of their members; ``file`` holds it, or else
    ``table``."""

    num_rows: int
    digest: bytes
    file: Path | None
    table: pa.Table | None

    def load(self) -> pa.Table:
        """A row per sample: key, and per member field, offset and size."""
        return self.table if self.table is not None else _mapped(self.file)


def index(path: str, size: int) -> Index:
    """The index of a tar, from the cache if it is there.

    Args:
        path: local, or a URL of fsspec.
        size: of the file, in bytes.

    Raises:
        InputError: for a tar that is compressed, cut, or has members that could do harm.
    """
    stamp = [str(Path(path).resolve()), str(Path(path).stat().st_mtime_ns)] if is_local(path) else [path]
    file = cache_file("tars", "\n".join([*stamp, str(size)]))
    with contextlib.suppress(OSError, pa.ArrowInvalid):
        return _described(_mapped(file), file)
    table = _scan(path, size)
    try:
        with written(file) as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    except OSError:  # no cache: the index stays in memory
        return Index(table.num_rows, _digest(table), None, table)
    return _described(table, file)


def _described(table: pa.Table, file: Path) -> Index:
    return Index(table.num_rows, _digest(table), file, None)


def _digest(table: pa.Table) -> bytes:
    digest = hashlib.sha256()
    for batch in table.to_batches():
        digest.update(batch.serialize())
    return digest.digest()


def _mapped(file: Path | None) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()


def _scan(path: str, size: int) -> pa.Table:
    """One pass over the headers. Neighbours of one key are a sample, as in `datasets`; hidden files are none."""
    samples: list[dict[str, Any]] = []
    end = 0
    with _not_packed(path), opened(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            check_member(path, member)
            tar.members = []  # tarfile keeps every header otherwise
            end = member.offset_data + (member.size if member.isfile() else 0)
            key, field = base_plus_ext(member.name)
            if not member.isfile() or key is None or Path(member.name).name.startswith((".", "__")):
                continue
            _check_data(path, member, size)
            if not samples or samples[-1]["key"] != key:
                samples.append({"key": key, "fields": [], "offsets": [], "sizes": []})
            if field in samples[-1]["fields"]:
                raise InputError("data.source", path, f"holds {member.name} twice; a sample has one file per ending")
            for name, value in (("fields", field), ("offsets", member.offset_data), ("sizes", member.size)):
                samples[-1][name].append(value)
        stream.seek(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        if stream.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # tarfile takes it for the end, too
            raise InputError("data.source", path, "is cut: no block of zeros ends it; copy it again")
    return pa.Table.from_pylist(samples, schema=_SCHEMA).combine_chunks()


@contextlib.contextmanager
def _not_packed(path: str) -> Iterator[None]:
    try:
        yield
    except tarfile.ReadError as error:
        raise InputError("data.source", path, f"is cut, or no tar, or a packed one ({error}); unpack .gz") from None


def _check_data(path: str, member: tarfile.TarInfo, size: int) -> None:
    if member.offset_data + member.size > size:
        raise InputError("data.source", path, f"is cut within {member.name}; copy it again")
    if member.size > LARGEST_MEMBER:
        raise InputError("data.source", path, f"holds {member.name} of {member.size} bytes; a row has 1 GiB at most")
    if member.issparse() or Path(member.name).suffix.lower() in (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip"):
        raise InputError("data.source", path, f"holds {member.name}, which is packed again; pack the file itself")


class TarRows(Sequence):
    """The rows of a tar, decoded as `datasets` does; images stay encoded.

    Args:
        path: of the tar.
        table: its index.
        features: of the columns that are read.
    """

    def __init__(self, path: str, table: pa.Table, features: datasets.Features) -> None:
        self._path, self._table, self._features = path, table, features
        self._file = opened(path)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self._table.slice(index, 1).to_pylist()[0]
        with readable(self._path, f"row {index} ({entry['key']}) "):
            row = next(WebDataset._get_pipeline_from_tar(self._path, self._members(entry)), {})
        row |= {"__key__": entry["key"], "__url__": self._path}
        return {name: self._value(row, name, feature) for name, feature in self._features.items()}

    def _members(self, entry: dict[str, Any]) -> Iterator[tuple[str, io.BytesIO]]:
        for field, offset, size in zip(entry["fields"], entry["offsets"], entry["sizes"], strict=True):
            if field in self._features:
                self._file.seek(offset)
                yield f"{entry['key']}.{field}", io.BytesIO(self._file.read(size))

    @staticmethod
    def _value(row: dict[str, Any], name: str, feature: Any) -> Any:
        value = row.get(name)
        stored = isinstance(feature, datasets.Image) and value is not None
        return {"bytes": value, "path": f"{row['__key__']}.{name}"} if stored else value
