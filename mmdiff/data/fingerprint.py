"""An identifier of a data set: its rows, its columns and a hash of a few hundred rows, independent of its folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from torch import Tensor

from mmdiff.data.streamed import StreamedRows
from mmdiff.data.table import ROW, Rows

SAMPLE = 256  # rows that are read, evenly spaced


def fingerprint(rows: Rows) -> dict[str, Any]:
    """{"rows": their number, "columns": their names, "hash": of a sample of rows}; nothing is decoded.

    Of streamed rows the hash is that of the files' names, sizes, metadata and some of their content.
    """
    if isinstance(rows, StreamedRows):
        return rows.fingerprint()
    columns = sorted(set(rows.column_names) - {ROW})
    digest = hashlib.sha256()
    rows = rows.with_format("arrow") if isinstance(rows, datasets.Dataset) else rows
    count = len(rows)
    for index in sorted({round(k * (count - 1) / (SAMPLE - 1)) for k in range(SAMPLE)} if count else ()):
        row: Any = rows[index]
        row = row if isinstance(row, dict) else row.to_pylist()[0]
        for name in columns:
            _add(digest, row.get(name))
    return {"rows": count, "columns": columns, "hash": digest.hexdigest()[:16]}


def _add(digest: Any, value: Any) -> None:
    """Add a value and its type to a hash; of a file outside the data set, its name and size."""
    digest.update(f"{type(value).__name__}:".encode())
    if isinstance(value, dict):
        if set(value) == {"bytes", "path"}:
            value = {"bytes": value["bytes"] or _file(value["path"])}
        for key in sorted(value):
            digest.update(f"{key}=".encode())
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)}".encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(_bytes(value))


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, Image.Image):
        return f"{value.mode}{value.size}".encode() + value.tobytes()
    if isinstance(value, np.ndarray | Tensor):
        array = np.asarray(value)
        return f"{array.dtype}{array.shape}".encode() + array.tobytes()
    return repr(value).encode()


def _file(path: str | None) -> str:
    file = Path(path or "")
    return f"{file.name} {file.stat().st_size if path and file.is_file() else None}"
