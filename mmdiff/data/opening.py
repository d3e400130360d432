"""Files that are read at any offset, here or on the hub, one line for what cannot be read, and a cache of indices."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import datasets
import fsspec
import numpy as np

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


def cache_file(kind: str, key: str) -> Path:
    """A file in the cache of `datasets`.

    Args:
        kind: of what is cached.
        key: all that it depends on.
    """
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / f"mmdiff-{kind}" / name


@contextlib.contextmanager
def written(file: Path) -> Iterator[BinaryIO]:
    """Write a file whole or not at all, as several processes may write it at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as sink:
            yield sink
        Path(partial).replace(file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def cached_array(kind: str, key: str, length: int, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array of numbers from the cache, or made and put there; ``kind`` and ``key`` as of `cache_file`."""
    file = cache_file(kind, key)
    with contextlib.suppress(OSError, ValueError, EOFError):
        array = np.load(file, allow_pickle=False)
        if array.shape == (length,):
            return array
    array = make()
    with contextlib.suppress(OSError), written(file) as sink:
        np.save(sink, array, allow_pickle=False)
    return array
