"""Masks as people store them: ids or colours of an image, and the classes that they stand for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image as PILImage

from mmdiff.errors import InputError
from mmdiff.modalities.files import as_array, of_file
from mmdiff.modalities.pictures import SIXTEEN_BITS

_ID_MODES = ("1", "L", "P", "I", "F", *SIXTEEN_BITS)
_SHOWN = 6  # raw values that a refusal lists


def raw_ids(raw: Any, coloured: bool) -> np.ndarray:
    """(height, width) int64 of the raw ids; of a coloured mask of `packed` colours.

    Args:
        raw: a PIL image, a stored file, an array or a nested list.
        coloured: whether the colours count, not the ids.

    Raises:
        InputError: for what holds neither.
    """
    mask = readable(raw)
    if isinstance(mask, PILImage.Image):
        return _of_image(mask, coloured)
    if coloured and mask.ndim == 3 and mask.shape[2] == 3 and mask.dtype.kind in "iu":
        return _packed(mask)
    if mask.ndim != 2:
        raise InputError("mask", f"shape {mask.shape}", "is no map of class ids (h, w); check data.columns")
    return mask.astype(np.int64)


def readable(raw: Any) -> PILImage.Image | np.ndarray:
    """A raw mask as a loaded image or an array whose numbers can be ids or colours.

    Raises:
        InputError: for one that cannot be read, has transparent pixels, or holds fractions.
    """
    mask = of_file("mask", raw)
    if not isinstance(mask, PILImage.Image):
        array = as_array(mask)
        if array.dtype.kind == "f" and bool(((array == array.round()) & (np.abs(array) < 2**31)).all()):
            array = array.astype(np.int64)
        if array.ndim not in (2, 3) or array.dtype.kind not in "iub":
            raise InputError("mask", type(raw).__name__, "is no map of class ids; check data.columns")
        return array
    band = mask.getbands()[-1]
    if band in "Aa" and mask.mode != "LAB" and min(mask.getchannel(band).getextrema()) < 255:
        raise InputError("mask", mask.mode, "has transparent pixels, which are no class; store it without alpha")
    if mask.mode == "F" and not (np.asarray(mask) == np.asarray(mask).round()).all():  # NaN neither
        raise InputError("mask", mask.mode, "holds fractions, which are no class ids; store whole numbers")
    return mask


def _of_image(image: PILImage.Image, coloured: bool) -> np.ndarray:
    if coloured:
        return _packed(np.asarray(image.convert("RGB")))
    if image.mode in _ID_MODES:
        return np.asarray(image).astype(np.int64)
    colours = np.asarray(image.convert("RGB"))
    if (colours == colours[..., :1]).all():  # a grey image that a tool stored in colour
        return colours[..., 0].astype(np.int64)
    pixels = tally(_packed(colours))
    raise InputError("mask", image.mode, f"is coloured: {shares(pixels, True)}; set colors, one RGB triple per class")


def packed(colour: Sequence[int]) -> int:
    """A colour as one number."""
    red, green, blue = colour
    return (red << 16) + (green << 8) + blue


def unpacked(value: int) -> list[int]:
    """Inverse of `packed`."""
    return [value >> 16, value >> 8 & 255, value & 255]


def _packed(colours: np.ndarray) -> np.ndarray:
    return colours.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


def tally(ids: np.ndarray) -> Counter:
    """{raw id: pixels} of one mask."""
    return Counter(dict(zip(*(part.tolist() for part in np.unique(ids, return_counts=True)))))


def counted(raws: Iterable[Any], coloured: bool) -> tuple[Counter, set[tuple[int, int]], Any]:
    """({raw id: pixels}, all sizes (height, width), the first mask) of a column."""
    pixels, sizes, first = Counter(), set(), None
    for raw in raws:
        if raw is not None:
            first = raw if first is None else first
            ids = raw_ids(raw, coloured)
            pixels.update(tally(ids))
            sizes.add(ids.shape)
    return pixels, sizes, first


def shares(pixels: Counter, coloured: bool) -> str:
    """The commonest raw values and their shares of the pixels: "0: 81.2 %, 255: 18.8 %"."""
    total = sum(pixels.values())
    parts = [f"{_shown(value, coloured)}: {count / total:.1%}" for value, count in pixels.most_common(_SHOWN)]
    return ", ".join(parts) + (", …" if len(pixels) > _SHOWN else "")


def _shown(value: int, coloured: bool) -> str:
    return str(unpacked(value)) if coloured else str(value)


def check_known(pixels: Counter, known: Sequence[int], coloured: bool, remedy: str) -> None:
    """Refuse raw values that stand for no class.

    Raises:
        InputError: with the raw values that occur and their shares.
    """
    unknown = sorted(set(pixels) - set(known))
    if unknown:
        text = f"is no class and not ignore; found {shares(pixels, coloured)}; {remedy}"
        raise InputError("mask", _shown(unknown[0], coloured) if coloured else unknown[0], text)


def classes(ids: np.ndarray, known: Mapping[int, int]) -> np.ndarray:
    """Raw ids as class ids; ``known`` is {raw id: class}, of all that occur."""
    values, inverse = np.unique(ids, return_inverse=True)
    return np.array([known[value] for value in values.tolist()], dtype=np.int64)[inverse].reshape(ids.shape)


def own_palette(raw: Any, ids: Sequence[int]) -> list[list[int]] | None:
    """RGB of these ids in an indexed image; None for anything else."""
    image = of_file("mask", raw)
    colours = image.getpalette("RGB") if isinstance(image, PILImage.Image) and image.mode == "P" else None
    rows = np.array(colours or []).reshape(-1, 3).tolist()
    return [rows[index] for index in ids] if min(ids) >= 0 and max(ids) < len(rows) else None


def check_lists(count: int, **lists: list[Any] | None) -> None:
    """Settings with one entry per class."""
    if lists["values"] and lists["colors"]:
        raise InputError("values", lists["values"], "a mask has ids or colours; leave values or colors out")
    for name, entries in lists.items():
        if entries is None:
            continue
        if len(entries) != count:
            raise InputError(name, entries, f"needs {count} entries, one per class")
        if name != "palette" and len({str(entry) for entry in entries}) != count:
            raise InputError(name, entries, "names something twice")
        if name == "values" and not all(isinstance(entry, int) and 0 <= entry < 65536 for entry in entries):
            raise InputError(name, entries, "needs ids from 0 to 65535")
        if name in ("colors", "palette") and not all(_is_colour(entry) for entry in entries):
            raise InputError(name, entries, "needs RGB triples, 0 … 255")


def _is_colour(entry: Any) -> bool:
    return (
        isinstance(entry, list | tuple) and len(entry) == 3 and all(isinstance(c, int) and 0 <= c < 256 for c in entry)
    )


def raw_ignore_of(ignore: Any, raws: list[int], coloured: bool) -> int | None:
    """The raw id, or packed colour, of ignored pixels."""
    if coloured and not isinstance(ignore, list | tuple):
        ignore = None  # an id means nothing among colours
    if ignore == 255 and 255 in raws:
        ignore = None  # the default gives way to a class
    if ignore is not None and (coloured or isinstance(ignore, list | tuple)):
        if not (coloured and _is_colour(ignore)):
            raise InputError("ignore", ignore, "is an integer or null; of coloured masks an RGB triple")
        ignore = packed(ignore)
    if ignore is not None and (isinstance(ignore, bool) or not isinstance(ignore, int) or ignore in raws):
        raise InputError("ignore", ignore, "must be an integer that is no class's own, or null")
    return ignore


def free_id(taken: list[int], wanted: int | None) -> int:
    """An id of a picture for ignored pixels: their own, or one that no class has."""
    if wanted is not None and 0 <= wanted <= 255 and wanted not in taken:
        return wanted
    return next(index for index in range(255, -1, -1) if index not in taken)


def number_of_classes(pixels: Counter, ignore: int | None, chosen: bool) -> int:
    """K of a column of ids 0 … K − 1, every one of which occurs."""
    ids = sorted(raw for raw in pixels if raw != ignore)
    if not ids:
        raise InputError("mask", None, "the column holds no class ids; check data.columns")
    if len(ids) < 2 or ids != list(range(len(ids))):
        text = f"are no ids 0 … K − 1, each of them used; found {shares(pixels, False)}; {remedy_of(pixels, 0)}"
        raise InputError("mask", "raw values", text)
    return len(ids)


def remedy_of(pixels: Counter, count: int, coloured: bool = False) -> str:
    if coloured:
        return "add it to colors, or make it ignore"
    every = sorted(pixels)
    listed = (
        f"values: {every}"
        if len(every) <= 12
        else "values, all raw ids in the order of the classes (JPEG blurs them: store PNG)"
    )
    return f"set {listed}" + (", or num_classes where a class has no pixel" if not count else ", num_classes or ignore")
