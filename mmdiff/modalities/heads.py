"""What several modalities share: files, maps between the diffusion space and maps of another size, a Gaussian head."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import einops
import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool3d, avg_pool2d, pixel_shuffle, pixel_unshuffle

from mmdiff.errors import InputError
from mmdiff.image_files import is_array
from mmdiff.modalities.base import Shape
from mmdiff.modalities.pictures import loaded

Size = int | tuple[int, int] | list[int]
LARGEST = 1e18  # of a number or a norm: its square fits float32


def height_width(size: Size) -> tuple[int, int]:
    """One number for a square, or (height, width)."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise InputError("size", size, "needs one number, or height and width")
    return sides[0], sides[1]


def check_range(key: str, value: Tensor) -> None:
    """Refuse pixels outside [−1, 1].

    Raises:
        InputError: naming the range that was found.
    """
    low, high = value.aminmax()
    if float(low) < -1 - 1e-4 or float(high) > 1 + 1e-4:
        found = f"{float(low):.3g} … {float(high):.3g}"
        raise InputError(key, found, "pixels of a tensor lie in [−1, 1]; for 0 … 255 pass a PIL image or a uint8 array")


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


def save_array(shown: np.ndarray, stem: Path) -> Path:
    """Write an array as a .npy file."""
    path = stem.with_name(f"{stem.name}.npy")
    np.save(path, shown)
    return path


def save_image(shown: PILImage.Image, stem: Path) -> Path:
    """Write an image as a PNG file."""
    path = stem.with_name(f"{stem.name}.png")
    shown.save(path)
    return path


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


def widened(x: Tensor) -> Tensor:
    """A modality's own weights, float32 at least: in a model of half precision only `decode` computes in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def repeated(grids: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), multiples of h and w: every number fills a rectangle.

    Like interpolation to the nearest, three times faster on small grids.
    """
    rows, columns = size[0] // grids.shape[2], size[1] // grids.shape[3]
    return einops.repeat(grids, "b c h w -> b c (h rows) (w columns)", rows=rows, columns=columns)


def to_space(x: Tensor, space: tuple[int, int, int]) -> Tensor:
    """(B, c, h, w) -> (B, C, H, W): averages over areas and over neighbouring channels; equal shapes pass through."""
    return x if tuple(x.shape[1:]) == tuple(space) else adaptive_avg_pool3d(x[:, None], space)[:, 0]


def to_grid(x: Tensor, space: tuple[int, int, int]) -> Tensor:
    """(B, c, h, w) -> (B, c · f², H, W): nothing is lost where h = f · H; a smaller map is repeated."""
    height, width = space[1:]
    if x.shape[2] >= height:
        return pixel_unshuffle(x, _factor(x.shape[2:], (height, width)))
    return nn.functional.interpolate(x, (height, width), mode="nearest")


def cells(size: tuple[int, int], space: tuple[int, int, int]) -> tuple[int, int, int]:
    """(rows, columns, f): the map as cells of f×f pixels, each no larger than a pixel of the diffusion space."""
    factor = max(1, size[0] // space[1])
    return size[0] // factor, size[1] // factor, factor


def grown(x: Tensor, factor: int) -> Tensor:
    """(…, h, w) -> (…, f · h, f · w), every entry repeated."""
    return x.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def grid_channels(channels: int, size: tuple[int, int], space: tuple[int, int, int]) -> int:
    """Channels of `to_grid`'s result."""
    return channels * _factor(size, space[1:]) ** 2 if size[0] >= space[1] else channels


def _factor(size: Any, other: Any) -> int:
    """f with size = f · other on both sides."""
    factor = size[0] // other[0]
    if factor < 1 or (factor * other[0], factor * other[1]) != tuple(size):
        raise InputError(
            "size",
            tuple(size),
            f"must be a whole multiple or a divisor of the grid {tuple(other)}; set size, and resize: true",
        )
    return factor


class SpatialHead(nn.Module):
    """Features (B, F, H / s, W / s) -> a map (B, channels, h, w) by one convolution and a pixel shuffle.

    Args:
        shape: the surroundings.
        channels: of the map.
        size: (h, w), a multiple or a divisor of the features' size.
    """

    def __init__(self, shape: Shape, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        grid = (shape.space[1] // shape.stride, shape.space[2] // shape.stride)
        self.up = _factor(size, grid) if size[0] >= grid[0] else 1
        self.down = 1 if size[0] >= grid[0] else _factor(grid, size)
        self.conv = nn.Conv2d(shape.features, channels * self.up**2, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        features = avg_pool2d(features, self.down) if self.down > 1 else features  # (B, F, h / up, w / up)
        return pixel_shuffle(self.conv(features), self.up)  # (B, channels, h, w)


class GaussianHead(nn.Module):
    """N(mean, σ² I) of a map, one σ per sample. Its params are (B, channels + 1, h, w): the mean, and log σ.

    Args:
        shape, channels, size: see `SpatialHead`.
    """

    def __init__(self, shape: Shape, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.mean = SpatialHead(shape, channels, size)
        self.log_std = nn.Linear(shape.pooled, 1)

    def forward(self, features: Tensor, pooled: Tensor) -> Tensor:
        mean = self.mean(features)  # (B, channels, h, w)
        log_std = self.log_std(pooled).clamp(-5.0, 2.0)[:, :, None, None]  # (B, 1, 1, 1)
        return torch.cat([mean, log_std.expand(-1, -1, *mean.shape[2:])], dim=1)


def gaussian_nll(params: Tensor, value: Tensor) -> Tensor:
    """−log density per pixel and channel, (B, channels, h, w), nats."""
    mean, log_std = params[:, :-1], params[:, -1:]
    return 0.5 * ((value - mean) / log_std.exp()) ** 2 + log_std + 0.5 * math.log(2 * math.pi)


def gaussian_sample(params: Tensor, noise: Tensor) -> Tensor:
    """mean + σ · noise."""
    return params[:, :-1] + params[:, -1:].exp() * noise
