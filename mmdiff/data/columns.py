"""Values as columns of parquet files that any reader opens: images, numbers and bytes of arrays, all without loss."""

from __future__ import annotations

import io
import math
from typing import Any, Literal

import datasets
import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from mmdiff.config.base import Strict
from mmdiff.errors import InputError

#: {kind of number of a value: {bytes per number in a file: its type there}}
_STORED: dict[str, dict[int, str]] = {
    "f": {2: "float16", 4: "float32", 8: "float64"},
    "i": {1: "uint8", 2: "int16", 8: "int64"},
}
_GREY, _RGB = 1, 3


class Column(Strict):
    """How the values of a modality stand in a file.

    *pixels*: an image file in a column of images, of 8 bits where these are exact, else of floats. *numbers*: a number
    or a list of them. *bytes*: the numbers of an array, C order, little-endian, in as few bytes each as are exact.
    """

    codec: Literal["pixels", "numbers", "bytes"]
    dtype: Literal["float32", "float64", "int64"]  # of the values in a batch
    shape: list[int]  # of a value
    half: bool = False  # floating bytes as float16, which is not exact

    @classmethod
    def of(cls, placeholder: Tensor, pixels: bool = False, half: bool = False) -> Column:
        """The column of values like this one.

        Args:
            placeholder: a value.
            pixels: whether it is an image (1 or 3, height, width) in [−1, 1].
            half: whether arrays of floats become float16.

        Raises:
            InputError: for numbers of another type.
        """
        dtype, shape = str(placeholder.dtype).removeprefix("torch."), list(placeholder.shape)
        if dtype not in ("float32", "float64", "int64"):
            raise InputError("value", dtype, "cannot be encoded; values are float32, float64 or int64")
        codec = "pixels" if pixels else "numbers" if placeholder.ndim < 2 else "bytes"
        return cls(codec=codec, dtype=dtype, shape=shape, half=half and codec == "bytes" and dtype != "int64")

    def feature(self) -> Any:
        """Its `datasets` feature."""
        if self.codec == "pixels":
            return datasets.Image()
        if self.codec == "bytes":
            return datasets.Value("binary")
        return datasets.List(datasets.Value(self.dtype)) if self.shape else datasets.Value(self.dtype)

    @property
    def row_bytes(self) -> int:
        """About as many as a row has in a file, before compression."""
        return math.prod(self.shape) * (1 if self.codec == "pixels" else 4)

    def store(self, value: Tensor) -> Any:
        """A value as it stands in a file."""
        array = value.detach().cpu().numpy()
        if self.codec == "pixels":
            return {"bytes": _image_file(array), "path": None}
        if self.codec == "numbers":
            return array.tolist()
        return array.astype(self._narrow(array)).tobytes()

    def load(self, raw: Any) -> Tensor:
        """What `store` was given.

        Raises:
            InputError: it is of another shape.
        """
        if self.codec == "pixels":
            return torch.from_numpy(_pixels(raw, tuple(self.shape)))
        if self.codec == "numbers":
            value = torch.tensor(raw, dtype=getattr(torch, self.dtype))
            if list(value.shape) != self.shape:
                raise InputError("value", tuple(value.shape), f"is damaged; expected {tuple(self.shape)}")
            return value
        count = math.prod(self.shape)
        widths = _STORED[np.dtype(self.dtype).kind]
        if not isinstance(raw, bytes) or len(raw) not in [count * width for width in widths]:
            raise InputError("value", type(raw).__name__, f"is damaged; expected the bytes of {tuple(self.shape)}")
        array = np.frombuffer(raw, widths[len(raw) // count]).reshape(self.shape)
        return torch.from_numpy(array.astype(self.dtype))

    def _narrow(self, array: np.ndarray) -> str:
        """The narrowest type that holds the numbers."""
        if array.dtype.kind == "f":
            return "float16" if self.half else self.dtype
        low, high = array.min(), array.max()
        return "uint8" if low >= 0 and high < 2**8 else "int16" if low >= -(2**15) and high < 2**15 else "int64"


def _header(shape: tuple[int, ...]) -> bytes:
    """Of a PGM or PPM file, which is read as fast as memory is copied; parquet compresses it."""
    return f"P{5 if shape[0] == _GREY else 6}\n{shape[2]} {shape[1]}\n255\n".encode()


def _image_file(value: np.ndarray) -> bytes:
    """(1 or 3, height, width) in [−1, 1] as a PGM or PPM file, or as a TIFF of floats where 8 bits are not exact."""
    pixels = ((value + 1) * np.float32(127.5)).round().clip(0, 255).astype(np.uint8)
    if np.array_equal(_values(pixels), value):
        return _header(value.shape) + np.ascontiguousarray(pixels.transpose(1, 2, 0)).tobytes()
    if (value != value[:1]).any():
        raise InputError("value", "colours", "cannot be encoded: they are no multiples of 1/255")
    file = io.BytesIO()
    PILImage.fromarray(value[0]).save(file, "TIFF")
    return file.getvalue()


def _values(pixels: np.ndarray) -> np.ndarray:
    """0 … 255 -> [−1, 1], by the arithmetic with which an image is read."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def _pixels(raw: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A stored image as values (channels, height, width)."""
    file, header = raw.get("bytes") if isinstance(raw, dict) else None, _header(shape)
    if isinstance(file, bytes) and file.startswith(header) and len(file) == len(header) + math.prod(shape):
        rows = np.frombuffer(file, np.uint8, offset=len(header)).reshape(*shape[1:], shape[0])
        return _values(rows.transpose(2, 0, 1))
    try:
        with PILImage.open(io.BytesIO(file)) as image:
            floats = np.asarray(image)
    except Exception as error:  # Pillow's parsers raise any kind
        raise InputError("value", type(raw).__name__, f"is no stored image ({type(error).__name__})") from None
    if floats.dtype != np.float32 or floats.shape != shape[1:]:
        raise InputError("value", f"{floats.dtype} {floats.shape}", f"is damaged; expected an image of {shape}")
    return np.repeat(floats[None], shape[0], 0)
