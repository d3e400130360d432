"""Which files are images: one list, that of `datasets`, for class folders, paired folders and sets of photos."""

from __future__ import annotations

import functools
from pathlib import Path


def is_image(file: Path) -> bool:
    """Whether a file's ending is that of an image."""
    return file.suffix.lower() in _suffixes()


@functools.cache
def _suffixes() -> frozenset[str]:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return frozenset(ImageFolder.EXTENSIONS)
