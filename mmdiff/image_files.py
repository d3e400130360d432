"""Which files are images or arrays, by the list of suffixes of `datasets`."""

from __future__ import annotations

import functools
from pathlib import Path


def is_image(file: Path) -> bool:
    """Whether a file has the suffix of an image. Hidden files, which macOS puts beside photos, are none."""
    return not file.name.startswith(".") and file.suffix.lower() in _suffixes()


def is_array(file: Path) -> bool:
    """Whether a file has the suffix of a numpy array, in which maps of numbers and ids are stored."""
    return not file.name.startswith(".") and file.suffix.lower() == ".npy"


@functools.cache
def _suffixes() -> frozenset[str]:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return frozenset(ImageFolder.EXTENSIONS)
