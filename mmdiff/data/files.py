"""Images in rows stay encoded until a modality decodes them, so that an error can name the row."""

from __future__ import annotations

import copy
import functools
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
    info.features = undecoded_features(rows.features)
    return datasets.Dataset(rows.data, info, rows.split, rows._indices, f"{rows._fingerprint}u")


def undecoded_features(features: datasets.Features) -> datasets.Features:
    """The same features, with images that stay encoded."""
    features = copy.deepcopy(features)
    for feature in features.values():
        _switch_off(feature)
    return features


def _switch_off(feature: Any) -> None:
    if isinstance(feature, datasets.Image):
        feature.decode = False
    elif isinstance(feature, datasets.List | datasets.LargeList):
        _switch_off(feature.feature)


def with_images(rows: Any, key: str, column: str, folder: Path | None) -> Any:
    """The same rows with a column of paths, of whole files, or of lists of these as a column of images.

    Args:
        rows: of a source; generated rows and other types of column are returned unchanged.
        key: of the config, for errors.
        column: its name.
        folder: of relative paths; None: the source has no folder or several.

    Raises:
        InputError: for a URL, and for a relative path without a folder, naming the row.
    """
    streamed = getattr(rows, "converted", None)
    feature = rows.features.get(column) if isinstance(rows, datasets.Dataset) or streamed else None
    many = isinstance(feature, datasets.List | datasets.LargeList)
    if not _holds_files(feature.feature if many else feature):
        return rows

    one = functools.partial(_converted, f"{key}={column}", many, folder)  # can be pickled

    def convert(values: list[Any], numbers: list[int]) -> dict[str, list[Any]]:
        return {column: list(map(one, values, numbers))}

    features = rows.features.copy()
    features[column] = datasets.List(STORED) if many else STORED
    if streamed:
        return streamed(column, features[column], one)
    counted = ROW in rows.column_names
    inputs = {"input_columns": [column, ROW]} if counted else {"input_columns": [column], "with_indices": True}
    return rows.map(convert, batched=True, features=features, keep_in_memory=True, desc=f"Files of {column}", **inputs)


def _holds_files(feature: Any) -> bool:
    """Whether a column holds paths, whole files, or structs of these such as {"bytes": …, "width": …}."""
    if isinstance(feature, dict):
        return bool({"bytes", "path"} & set(feature))
    kind = feature.dtype.removeprefix("large_").removesuffix("_view") if isinstance(feature, datasets.Value) else ""
    return kind in ("string", "binary")


def _converted(place: str, many: bool, folder: Path | None, value: Any, row: int | str) -> Any:
    place = f"{place}, row {row}"
    return [_file(place, one, folder) for one in value or ()] if many else _file(place, value, folder)


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
