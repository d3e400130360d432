"""Raw values: files that are opened and written, arrays, and the range of numbers."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.image_files import is_array, is_image
from mmdiff.modalities.pictures import loaded

LARGEST = 1e18  # of a number or a norm: its square fits float32


def save_file(output: Any, stem: Path) -> Path:
    """Write an image as .png, an array as .npy, anything else as .txt; the ending is added to ``stem``."""
    if isinstance(output, PILImage.Image):
        output.save(path := stem.with_name(f"{stem.name}.png"))
    elif isinstance(output, np.ndarray):
        np.save(path := stem.with_name(f"{stem.name}.npy"), output)
    else:
        (path := stem.with_name(f"{stem.name}.txt")).write_text(f"{output}\n")
    return path


def open_file(key: str, text: str) -> Any:
    """What `save_file` has written: an image, an array, or a text. Any other text stays what it is.

    Raises:
        InputError: for a file that is not there or cannot be read.
    """
    if is_array(Path(text)):
        return open_array(key, text)
    if is_image(Path(text)):
        return open_image(key, text)
    if not text.endswith(".txt"):
        return text
    try:
        return file_at(key, text).read_text().removesuffix("\n")
    except UnicodeDecodeError:
        raise InputError(key, text, "is no text file") from None


def file_at(key: str, text: str) -> Path:
    """A path that a person typed, of a file that is there."""
    path = Path(text)
    if not path.is_file():
        raise InputError(key, text, "no such file")
    return path


def open_image(key: str, text: str) -> PILImage.Image:
    """An image file, upright as its EXIF data say."""
    return loaded(key, {"bytes": None, "path": str(file_at(key, text))})


def open_array(key: str, text: str) -> np.ndarray:
    """A .npy file."""
    return _load_array(key, text, file_at(key, text))


def _load_array(key: str, name: str, file: Path | io.BytesIO) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(key, name, f"cannot be read as .npy: {error}") from None


def of_file(key: str, raw: Any) -> Any:
    """A raw value of a map: an image, and a stored file, as an image with its pixels or as the array of a .npy file.

    Raises:
        InputError: naming the file.
    """
    if isinstance(raw, Mapping) and set(raw) == {"bytes", "path"} and is_array(Path(raw["path"] or "")):
        file = Path(raw["path"]) if raw["bytes"] is None else io.BytesIO(raw["bytes"])
        return _load_array(key, raw["path"], file)
    return loaded(key, raw) if isinstance(raw, PILImage.Image | Mapping) else raw


def open_numbers(key: str, text: str) -> Any:
    """A .npy or .json file, or numbers with commas."""
    if text.endswith(".npy"):
        return open_array(key, text)
    path = file_at(key, text) if text.endswith(".json") else None
    try:
        return json.loads(path.read_text()) if path else [float(x) for x in text.split(",")]
    except (OSError, ValueError) as error:
        raise InputError(key, text, f"cannot be read as .npy, .json or numbers with commas: {error}") from None


def as_array(raw: Any) -> np.ndarray:
    """A list, an array or a loaded image as an array; anything else, a ragged list too, as one of no dimension."""
    try:
        array = np.asarray(raw) if isinstance(raw, list | tuple | np.ndarray | PILImage.Image) else np.zeros(())
    except ValueError:
        return np.zeros(())
    decimals = array.dtype == object and all(isinstance(number, Decimal) for number in array.flat)
    return array.astype(np.float64) if decimals else array


def as_vector(key: str, raw: Any) -> np.ndarray:
    """A list or an array of numbers as (D,) float64.

    Raises:
        InputError: for anything else.
    """
    if isinstance(raw, str):
        raise InputError(key, raw, "is text; store lists of numbers (jsonl, parquet), as a csv file has none")
    vector = as_array(raw)
    if vector.ndim != 1 or vector.dtype.kind not in "iuf" or not len(vector):
        remedy = "is no vector of numbers; check data.columns, and whether a number is missing"
        raise InputError(key, type(raw).__name__, remedy)
    return vector.astype(np.float64)


def check_range(key: str, value: Tensor) -> None:
    """Refuse pixels outside [−1, 1].

    Raises:
        InputError: naming their range.
    """
    low, high = value.aminmax()
    if float(low) < -1 - 1e-4 or float(high) > 1 + 1e-4:
        remedy = "pixels of a tensor lie in [−1, 1]; for 0 … 255 pass a PIL image or a uint8 array"
        raise InputError(key, f"{float(low):.3g} … {float(high):.3g}", remedy)


def check_numbers(key: str, what: str, numbers: np.ndarray | Tensor) -> None:
    """Refuse NaN, infinity and numbers whose square does not fit float32.

    Args:
        key: of the value, for errors.
        what: the thing that holds them, for errors.
        numbers: of any shape.

    Raises:
        InputError: for one of them.
    """
    if not bool((abs(numbers) <= LARGEST).all()):  # NaN is not, either
        remedy = f"must be finite and at most {LARGEST:g}, as its square must fit float32; rescale, or leave it out"
        raise InputError(key, what, remedy)
