"""Which files are images or maps: one list, that of `datasets`, for folders of classes, pairs and sets of photos."""

from __future__ import annotations

import functools
from pathlib import Path


def is_image(file: Path) -> bool:
    """Whether a file's ending is that of an image; hidden files are none, as macOS puts them beside photos."""
    return not file.name.startswith(".") and file.suffix.lower() in _suffixes()


def is_array(file: Path) -> bool:
    """Whether a file's ending is that of a numpy array, as which maps of numbers and ids are stored, too."""
    return not file.name.startswith(".") and file.suffix.lower() == ".npy"


@functools.cache
def _suffixes() -> frozenset[str]:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return frozenset(ImageFolder.EXTENSIONS)
