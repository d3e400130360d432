"""Maps: their sizes, and how they come to the size of the diffusion space."""

from __future__ import annotations

from typing import Any

import einops
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d, interpolate, pixel_unshuffle

from mmdiff.errors import InputError

Size = int | tuple[int, int] | list[int]


def height_width(size: Size) -> tuple[int, int]:
    """One number for a square, or (height, width)."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise InputError("size", size, "needs one number, or height and width")
    return sides[0], sides[1]


def check_size(key: str, size: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Refuse a map of another (height, width).

    Raises:
        InputError: naming both, as width x height.
    """
    if tuple(size) != tuple(wanted):
        (height, width), (rows, columns) = size, wanted
        raise InputError(key, f"{width}x{height}", f"expected {columns}x{rows}; or set resize: true")


def scaled(size: tuple[int, int], before: tuple[int, int], after: tuple[int, int]) -> tuple[int, int]:
    """A (height, width) that grows as ``before`` does to ``after``.

    Raises:
        InputError: for a size that would be no whole number.
    """
    products = [side * to for side, to in zip(size, after, strict=True)]
    if any(product % of for product, of in zip(products, before, strict=True)):
        remedy = f"has no whole size where {before[0]}x{before[1]} becomes {after[0]}x{after[1]}"
        raise InputError("size", tuple(size), remedy)
    return products[0] // before[0], products[1] // before[1]


def repeated(grids: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W): every number fills a rectangle, interpolation to the nearest.

    Where H and W are multiples of h and w it repeats, which is three times faster on small grids.
    """
    if size[0] % grids.shape[2] or size[1] % grids.shape[3]:
        return interpolate(grids, size, mode="nearest")
    rows, columns = size[0] // grids.shape[2], size[1] // grids.shape[3]
    return einops.repeat(grids, "b c h w -> b c (h rows) (w columns)", rows=rows, columns=columns)


def repeatable(key: str, side: int | None, space: tuple[int, int, int]) -> tuple[int, int]:
    """(rows, columns) of a square grid that `repeated` can bring to the diffusion space; None is the full size."""
    _, height, width = space
    if side is not None and (side < 1 or height % side or width % side):
        raise InputError(key, side, f"must divide the diffusion space's {height}x{width}")
    return side or height, side or width


def to_space(x: Tensor, space: tuple[int, int, int]) -> Tensor:
    """(B, c, h, w) -> (B, C, H, W): averages over areas and over neighbouring channels; equal shapes pass through."""
    return x if tuple(x.shape[1:]) == tuple(space) else adaptive_avg_pool3d(x[:, None], space)[:, 0]


def to_grid(x: Tensor, space: tuple[int, int, int]) -> Tensor:
    """(B, c, h, w) -> (B, c · f², H, W): nothing is lost where h = f · H; a smaller map is repeated."""
    height, width = space[1:]
    if x.shape[2] >= height:
        return pixel_unshuffle(x, factor_of(x.shape[2:], (height, width)))
    return interpolate(x, (height, width), mode="nearest")


def cells(size: tuple[int, int], space: tuple[int, int, int]) -> tuple[int, int, int]:
    """(rows, columns, f): the map as cells of f×f pixels, each no larger than a pixel of the diffusion space."""
    factor = max(1, size[0] // space[1])
    return size[0] // factor, size[1] // factor, factor


def grown(x: Tensor, factor: int) -> Tensor:
    """(…, h, w) -> (…, f · h, f · w), every entry repeated."""
    return x.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def grid_channels(channels: int, size: tuple[int, int], space: tuple[int, int, int]) -> int:
    """Channels of `to_grid`'s result."""
    return channels * factor_of(size, space[1:]) ** 2 if size[0] >= space[1] else channels


def factor_of(size: Any, other: Any) -> int:
    """f with size = f · other on both sides."""
    factor = size[0] // other[0]
    if factor < 1 or (factor * other[0], factor * other[1]) != tuple(size):
        raise InputError(
            "size",
            tuple(size),
            f"must be a whole multiple or a divisor of the grid {tuple(other)}; set size, and resize: true",
        )
    return factor
