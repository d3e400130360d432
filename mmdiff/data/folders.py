"""Paired folders: files with the same stem in several folders make one row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import datasets

from mmdiff.errors import InputError
from mmdiff.image_files import is_array, is_image

SPLITS = ("train", "validation", "test")


def load(**options: str) -> Mapping[str, datasets.Dataset]:
    """{split: rows} with a column of images for each folder.

    Args:
        options: {column: folder}. A row is a path below the folders, without its suffix. Sub-folders train,
            validation and test are splits if every folder has them.

    Raises:
        InputError: for a folder that is not there, two files of one stem, or a stem that a folder lacks.
    """
    roots = {column: _folder(column, folder) for column, folder in options.items()}
    if not roots:
        raise InputError("data.options", options, "name the folders: {image: photos, mask: masks}")
    splits = [name for name in SPLITS if all((root / name).is_dir() for root in roots.values())]
    if splits:
        return {name: _rows({c: root / name for c, root in roots.items()}, name) for name in splits}
    return {"train": _rows(roots, "train")}


def _folder(column: str, folder: str) -> Path:
    root = Path(folder).expanduser() if isinstance(folder, str) else None
    if root is None or not root.is_dir():
        raise InputError(f"data.options.{column}", folder, "no such folder")
    return root


def _rows(roots: Mapping[str, Path], split: str) -> datasets.Dataset:
    files = {column: _files(column, root) for column, root in roots.items()}
    every = sorted(set().union(*files.values()))
    for column, paths in files.items():
        if missing := [stem for stem in every if stem not in paths]:
            first = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            remedy = f"lacks {len(missing)} of {len(every)} stems: {first}; files pair by stem"
            raise InputError(f"data.options.{column}", str(roots[column]), remedy)
    columns = {c: [{"bytes": None, "path": str(paths[stem])} for stem in every] for c, paths in files.items()}
    features = datasets.Features({column: datasets.Image() for column in columns})
    return datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))


def _files(column: str, root: Path) -> dict[str, Path]:
    """{path without its suffix: file} of all images and .npy files below a folder."""
    paths: dict[str, Path] = {}
    for file in sorted(root.rglob("*")):
        if (is_image(file) or is_array(file)) and file.is_file():
            stem = file.relative_to(root).with_suffix("").as_posix()
            if stem in paths:
                raise InputError(f"data.options.{column}", str(file), f"has the stem of {paths[stem].name}; keep one")
            paths[stem] = file
    if not paths:
        raise InputError(f"data.options.{column}", str(root), "holds no images and no .npy files")
    return paths
