"""Images in rows stay encoded until a modality decodes them, so that an error can name the row."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets

from mmdiff.errors import InputError

ROW = "__row__"  # the column of a row's number in the source
STORED = datasets.Image(decode=False)


def undecoded(rows: Any) -> Any:
    """The same rows, with images as {"bytes": …, "path": …}: `datasets` would decode on access and name no row."""
    if not isinstance(rows, datasets.Dataset):
        return rows
    info = rows.info.copy()
    info.features = copy.deepcopy(rows.features)
    for feature in info.features.values():
        _switch_off(feature)
    return datasets.Dataset(rows.data, info, rows.split, rows._indices, f"{rows._fingerprint}u")


def _switch_off(feature: Any) -> None:
    if isinstance(feature, datasets.Image):
        feature.decode = False
    elif isinstance(feature, datasets.List | datasets.LargeList):
        _switch_off(feature.feature)


def with_images(rows: Any, key: str, column: str, folder: Path | None) -> Any:
    """The same rows with a column of paths, of whole files, or of lists of these as a column of images.

    Args:
        rows: of a source; other rows and other types of column are returned unchanged.
        key: of the config, for errors.
        column: its name.
        folder: of relative paths; None: the source has no folder or several.

    Raises:
        InputError: for a URL, and for a relative path without a folder, naming the row.
    """
    feature = rows.features.get(column) if isinstance(rows, datasets.Dataset) else None
    many = isinstance(feature, datasets.List | datasets.LargeList)
    if not _holds_files(feature.feature if many else feature):
        return rows

    def convert(values: list[Any], numbers: list[int]) -> dict[str, list[Any]]:
        images = []
        for value, number in zip(values, numbers):
            place = f"{key}={column}, row {number}"
            images.append([_file(place, v, folder) for v in value or ()] if many else _file(place, value, folder))
        return {column: images}

    features = rows.features.copy()
    features[column] = datasets.List(STORED) if many else STORED
    counted = ROW in rows.column_names
    inputs = {"input_columns": [column, ROW]} if counted else {"input_columns": [column], "with_indices": True}
    return rows.map(convert, batched=True, features=features, keep_in_memory=True, desc=f"Files of {column}", **inputs)


def _holds_files(feature: Any) -> bool:
    """Whether a column holds paths, whole files, or structs of these such as {"bytes": …, "width": …}."""
    if isinstance(feature, dict):
        return bool({"bytes", "path"} & set(feature))
    kind = feature.dtype.removeprefix("large_").removesuffix("_view") if isinstance(feature, datasets.Value) else ""
    return kind in ("string", "binary")


def _file(place: str, text: Any, folder: Path | None) -> dict[str, Any] | None:
    if isinstance(text, dict):
        text = text.get("bytes") or text.get("path")
    if not text:
        return None
    if isinstance(text, bytes):
        return {"bytes": text, "path": None}
    if "://" in text:
        raise InputError(place, text, "is a URL; download the images and name files")
    path = Path(text).expanduser()
    if folder is None and not path.is_absolute():
        remedy = "is relative, and data.source is no single folder; write absolute paths"
        raise InputError(place, text, remedy)
    return {"bytes": None, "path": str(path if folder is None else folder / path)}
