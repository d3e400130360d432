"""PolyMNIST from its published files (Sutter et al., 2021, arXiv 2105.02470): five images of one digit per row.

The folder holds what PolyMNIST.zip holds: `train/m0 … m4` and `test/m0 … m4`, each with one PNG per row that is named
`<row>.<label>.png`, in all five folders alike.
"""

from __future__ import annotations

import re
from pathlib import Path

import datasets

from mmdiff.errors import InputError

IMAGES = 5
_NAME = re.compile(r"(\d{1,9})\.(\d)\.png")


def load(folder: str) -> datasets.DatasetDict:
    """{"train", "validation"} with columns image_0 … image_4 and label; validation is the published test split.

    Args:
        folder: with the sub-folders train and test, or one that holds such a folder MMNIST.

    Raises:
        InputError: for a folder that is not there, a file of another name, or one that a modality lacks.
    """
    root = Path(folder).expanduser() if isinstance(folder, str) else Path()
    root = root / "MMNIST" if (root / "MMNIST").is_dir() else root
    if not isinstance(folder, str) or not root.is_dir():
        raise InputError("data.options.folder", folder, "no such folder; unpack PolyMNIST.zip and name its folder")
    return datasets.DatasetDict(
        {name: _rows(root / part) for name, part in (("train", "train"), ("validation", "test"))}
    )


def _rows(root: Path) -> datasets.Dataset:
    folders = [root / f"m{k}" for k in range(IMAGES)]
    names = [_names(folder) for folder in folders]
    for folder, own in zip(folders, names):
        if lacking := sorted(set().union(*names) - set(own)):
            remedy = f"lacks {len(lacking)} files that another modality has, such as {lacking[0]}"
            raise InputError("data.options.folder", str(folder), remedy)
    order = sorted(names[0], key=lambda name: int(name.partition(".")[0]))
    columns = {
        f"image_{k}": [{"bytes": None, "path": str(path / name)} for name in order] for k, path in enumerate(folders)
    }
    features = datasets.Features(
        dict.fromkeys(columns, datasets.Image()) | {"label": datasets.ClassLabel(names=[str(k) for k in range(10)])}
    )
    labels = {"label": [int(name.split(".")[1]) for name in order]}
    return datasets.Dataset.from_dict(columns | labels, features=features)


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise InputError("data.options.folder", str(folder), "no such folder; PolyMNIST has m0 … m4 in train and test")
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    for name in names:
        if not _NAME.fullmatch(name):
            raise InputError("data.options.folder", str(folder / name), "is not named <row>.<label>.png")
    if not names:
        raise InputError("data.options.folder", str(folder), "holds no files")
    return names
