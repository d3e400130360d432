"""Images of any kind that Pillow opens: read, turned upright, laid over a background, in the channels asked for."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image as PILImage
from PIL import ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

from mmdiff.errors import InputError

MODES = {1: "L", 3: "RGB"}
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
GREY = ("1", "L", "LA", "La", *SIXTEEN_BITS, "I", "F")
_ORIENTATION = 0x0112  # the tag of EXIF
logging.getLogger(TiffImagePlugin.__name__).setLevel(logging.CRITICAL)  # it logs what it raises as well
Result = TypeVar("Result")


def opened(key: str, raw: Any) -> PILImage.Image:
    """A raw value as an image of which the header is read, the pixels not yet.

    Args:
        key: of the value, for errors.
        raw: a PIL image, a file of a data set as {"bytes": …, "path": …}, a uint8 array (h, w) or (h, w, channels), or
            nested lists of its numbers.

    Raises:
        InputError: naming the file, where there is one.
    """
    if isinstance(raw, PILImage.Image):
        return _read(key, _name(raw), lambda: _unmapped(raw))
    if isinstance(raw, list | tuple):
        raw = _bytes_of(key, raw)
    if isinstance(raw, np.ndarray):
        return _of_array(key, raw)
    if not (isinstance(raw, Mapping) and set(raw) == {"bytes", "path"}):
        raise InputError(key, type(raw).__name__, "is no image; check data.columns")
    file = raw["path"] if raw["bytes"] is None else io.BytesIO(raw["bytes"])
    return _read(key, _name(raw), lambda: _unmapped(PILImage.open(file)))


def loaded(key: str, raw: Any) -> PILImage.Image:
    """The image with its pixels, upright as its EXIF data say; ``key`` and ``raw`` as of `opened`."""
    image = opened(key, raw)
    return _read(key, _name(raw), lambda: _upright(image))


def header(key: str, raw: Any) -> tuple[int, tuple[int, int]]:
    """(channels: 1 of a grey image, else 3; (height, width) of the upright image) of a raw value.

    Raises:
        InputError: naming the file, where there is one.
    """
    image = opened(key, raw)
    return 1 if image.mode in GREY else 3, _read(key, _name(raw), lambda: _size_of(image))


def _size_of(image: PILImage.Image) -> tuple[int, int]:
    if image.format == "TIFF":
        image.load()  # Pillow turns these itself, in some versions when they are opened
    inside = image.format == "PNG" and "exif" not in image.info  # PIL would read all pixels to look behind them
    turned = not inside and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def headers(key: str, values: Iterable[Any]) -> tuple[list[int], set[tuple[int, int]]]:
    """(channels of all: [1] where every image is grey, else [3]; [] of none; all sizes) of a column."""
    channels, sizes = 0, set()
    for raw in values:
        if raw is not None:
            own_channels, size = header(key, raw)
            channels = max(channels, own_channels)
            sizes.add(size)
    return [channels] if channels else [], sizes


def one_size(key: str, sizes: set[tuple[int, int]]) -> list[int]:
    """[height, width] of images that have one size.

    Raises:
        InputError: for several.
    """
    if len(sizes) > 1:
        (height, width), (other_height, other_width) = sorted(sizes)[0], sorted(sizes)[-1]
        actual = f"{width}x{height} and {other_width}x{other_height}"
        raise InputError(f"{key}.size", actual, "images of several sizes; set size, and resize: true")
    return list(next(iter(sizes)))


def flat(image: PILImage.Image, channels: int, background: tuple[int, int, int]) -> PILImage.Image:
    """A loaded image without transparency, of mode L or RGB; 16 bits and floats as mode F in 0 … 1.

    Args:
        image: from `loaded`.
        channels: 1 or 3.
        background: RGB that shows through transparent pixels.

    Raises:
        InputError: for numbers without a known range, or damaged colours.
    """
    return _read("image", _name(image), lambda: _flat(image, channels, background))


def _flat(image: PILImage.Image, channels: int, background: tuple[int, int, int]) -> PILImage.Image:
    if image.mode in _WIDE:
        return _flat_wide(image, channels, background)
    if image.has_transparency_data:
        image = _over(background, image)
    image = _from_lab(image) if image.mode == "LAB" else image
    return image.convert(MODES[channels])


def _flat_wide(image: PILImage.Image, channels: int, background: tuple[int, int, int]) -> PILImage.Image:
    """Mode F; RGB of 8 bits only where a coloured background shows through."""
    grey, clear = _WIDE[image.mode](np.asarray(image, dtype=np.float32)), _clear(image)
    if clear.any() and channels == 3 and len(set(background)) > 1:
        rgb = np.where(clear[..., None], np.array(background), (grey * 255).round()[..., None])
        return PILImage.fromarray(rgb.astype(np.uint8))
    behind = PILImage.new("RGB", (1, 1), background).convert("L").getpixel((0, 0)) / 255
    return PILImage.fromarray(np.where(clear, np.float32(behind), grey))


def _clear(image: PILImage.Image) -> np.ndarray:
    """(h, w) bool: the pixels of the one number that a wide grey PNG calls transparent."""
    number = image.info.get("transparency")
    numbers = np.asarray(image)
    return numbers == number if isinstance(number, int) else np.zeros(numbers.shape, dtype=bool)


def pixels_of(image: PILImage.Image, channels: int) -> np.ndarray:
    """(channels, h, w) float32 in 0 … 255 of an image from `flat`."""
    pixels = np.asarray(image, dtype=np.float32) * np.float32(255 if image.mode == "F" else 1)
    return np.repeat(pixels[None], channels, 0) if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def with_alpha(key: str, raw: Any, mode: str) -> PILImage.Image:
    """A raw value as an image of ``mode`` LA or RGBA.

    Raises:
        InputError: for an image without transparency, which does not say what is known.
    """
    image = loaded(key, raw)
    if not image.has_transparency_data:
        raise InputError(key, image.mode, "has no alpha channel; it must be opaque where the image is known")
    return _read(key, _name(raw), lambda: _with_alpha(image).convert("RGBA").convert(mode))


def _with_alpha(image: PILImage.Image) -> PILImage.Image:
    if image.mode not in _WIDE:
        return image.convert("LA") if image.mode == "La" else image
    grey = _WIDE[image.mode](np.asarray(image, dtype=np.float32)) * 255
    return PILImage.fromarray(np.stack([grey.round(), ~_clear(image) * 255], axis=-1).astype(np.uint8))


def resized(
    image: PILImage.Image, width: int, height: int, by: PILImage.Resampling = PILImage.Resampling.BICUBIC
) -> PILImage.Image:
    """Largest centred crop of the wanted shape, then resampled; an image of this size stays as it is."""
    if image.size == (width, height):
        return image
    factor = min(image.width / width, image.height / height)
    crop_width, crop_height = min(factor * width, image.width), min(factor * height, image.height)  # rounding
    left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
    right, bottom = min(left + crop_width, image.width), min(top + crop_height, image.height)
    image = image.resize((width, height), by, box=(left, top, right, bottom))
    overshoots = image.mode == "F" and by == PILImage.Resampling.BICUBIC  # of a picture, whose floats lie in 0 … 1
    return PILImage.fromarray(np.asarray(image).clip(0, 1)) if overshoots else image


def _bytes_of(key: str, raw: Sequence[Any]) -> np.ndarray:
    """Nested lists of whole numbers 0 … 255 as a uint8 array."""
    try:
        array = np.asarray(raw)
    except ValueError:  # lists of several lengths
        array = np.zeros(())
    if array.dtype.kind not in "iu" or not array.size or array.min() < 0 or array.max() > 255:
        actual = f"{type(raw).__name__} of {array.dtype}"
        raise InputError(key, actual, "is no image; needs whole numbers 0 … 255 (h, w) or (h, w, channels)")
    return array.astype(np.uint8)


def _of_array(key: str, array: np.ndarray) -> PILImage.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or not 1 <= channels <= 4 or not array.size:
        actual = f"array {array.shape} of {array.dtype}"
        raise InputError(key, actual, "is no image; needs uint8 (h, w) or (h, w, 1 … 4 channels), and pixels")
    return _read(
        key, f"array {array.shape}", lambda: PILImage.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
    )


def _read(key: str, name: str, read: Callable[[], Result]) -> Result:
    """What ``read`` gives; on damaged files Pillow's parsers raise any kind of exception."""
    try:
        return read()
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(key, name, "cannot be read as an image: no format that Pillow knows") from None
    except Exception as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        reason = said or type(error).__name__
        raise InputError(key, name, f"cannot be read as an image: {reason}") from None


def _unmapped(image: PILImage.Image) -> PILImage.Image:
    """The image from memory, where Pillow 13 would map a turned TIFF with its sides exchanged and scramble it."""
    turned = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_ORIENTATION, 1) > 4
    return PILImage.open(io.BytesIO(Path(image.filename).read_bytes())) if turned and image.filename else image


def _name(raw: Any) -> str:
    """Of a raw value, for errors."""
    if isinstance(raw, Mapping):
        return raw["path"] or f"{len(raw['bytes'] or b'')} bytes"
    return str(getattr(raw, "filename", "") or "an image")


def _upright(image: PILImage.Image) -> PILImage.Image:
    image.load()
    return image if image.getexif().get(_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)


def _over(background: tuple[int, int, int], image: PILImage.Image) -> PILImage.Image:
    """Alpha compositing; grey stays grey where the background is."""
    image = image.convert("LA") if image.mode == "La" else image  # PIL has no way from premultiplied grey to RGBA
    below = PILImage.new("RGBA", image.size, (*background, 255))
    below.alpha_composite(image.convert("RGBA"))
    return below.convert("RGB")


def _from_lab(image: PILImage.Image) -> PILImage.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")


def _sixteen_bits(numbers: np.ndarray) -> np.ndarray:
    if numbers.min(initial=0) < 0 or numbers.max(initial=0) > 65535:
        actual = f"{numbers.min():g} … {numbers.max():g}"
        raise InputError("image", actual, "32-bit integers outside 0 … 65535 have no known range; store 8 or 16 bits")
    return numbers / np.float32(65535)


def _unit_floats(numbers: np.ndarray) -> np.ndarray:
    if not (np.isfinite(numbers).all() and numbers.min(initial=0) >= 0 and numbers.max(initial=0) <= 1):
        actual = f"{numbers.min():g} … {numbers.max():g}"
        raise InputError("image", actual, "floats outside 0 … 1 have no known range; store 0 … 1, or 8 or 16 bits")
    return numbers


#: {mode: numbers -> 0 … 1}
_WIDE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    **dict.fromkeys((*SIXTEEN_BITS, "I"), _sixteen_bits),
    "F": _unit_floats,
}
