"""Files that are read at any offset, here or on the hub, and one line for what cannot be read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec

from mmdiff.errors import InputError


def is_local(path: str) -> bool:
    """Whether a path is none of another file system, such as ``hf://datasets/user/name@commit/file.parquet``."""
    return "://" not in path


def opened(path: str) -> BinaryIO:
    """A file for reading: a local path, or a URL of fsspec."""
    if is_local(path):
        return Path(path).open("rb")
    system, inner = fsspec.core.url_to_fs(path)
    return system.open(inner, "rb")


@contextlib.contextmanager
def readable(path: str, where: str = "") -> Iterator[None]:
    """One line for any error while a file is read.

    Args:
        path: of the file.
        where: in it.

    Raises:
        InputError: naming the file.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # pyarrow, fsspec and the decoders of members raise many kinds
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError("data.source", path, f"{where}cannot be read ({reason})") from error
