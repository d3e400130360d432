"""Hole patterns: which pixels of an image are known, as a pure function of (seed, position).

A pattern is a field of arrival times. Pixels are hidden in the order of these times until the requested share is
reached. Pixels with equal times are one unit; the hidden share exceeds the requested one by less than one unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.randomness import normal, uniform

_CELLS = 8  # a checkerboard is 8 × 8
_STROKES, _SEGMENTS = 3, 6  # of a free-form hole
_BRUSH = 0.1  # typical thickness of a stroke, relative to the side


def known_masks(
    pattern: str, ratio: float | Sequence[float], height: int, width: int, seed: int, positions: Tensor
) -> Tensor:
    """Masks of known pixels: (B, 1, height, width) float32, 1 = known, 0 = hole, on the device of ``positions``.

    A hole depends on (seed, position) alone, not on the batch.

    Args:
        pattern: a key of `PATTERNS`. The unit is a square (squares), a row or a column (box, half), a cell of the 8 × 8
            grid (checkerboard) or a pixel (free-form).
        ratio: share of hidden pixels, inside (0, 1); a pair (low, high) draws it uniformly for every sample.
        height, width: pixels.
        seed: of the run.
        positions: (B,) int64, for example row numbers or positions in the global batch.

    Raises:
        InputError: for an unknown pattern, or a ratio outside (0, 1).
    """
    if pattern not in PATTERNS:
        raise InputError("pattern", pattern, f"choose one of {', '.join(PATTERNS)}")
    low, high = _range(ratio)
    share = low + (high - low) * uniform(seed, 0, "holes/ratio", positions)  # (B,)
    arrival = PATTERNS[pattern](seed, positions, height, width, share).flatten(1)  # (B, H W)
    count = (share * (height * width)).round().long().clamp(1, height * width)
    last = _sorted(arrival).gather(1, count[:, None] - 1)  # (B, 1), when the share is reached
    return (arrival > last).float().reshape(-1, 1, height, width)


def _sorted(rows: Tensor) -> Tensor:
    """Rows in ascending order; on a CPU by numpy, which sorts with vector instructions (20 times faster than torch)."""
    return torch.from_numpy(np.sort(rows.numpy(), axis=1)) if rows.device.type == "cpu" else rows.sort(dim=1).values


def _range(ratio: float | Sequence[float]) -> tuple[float, float]:
    ends = tuple(ratio) if isinstance(ratio, Sequence) else (ratio, ratio)
    if len(ends) != 2 or not 0 < ends[0] <= ends[1] < 1:
        raise InputError("ratio", ratio, "the share of hidden pixels is a number inside (0, 1), or a pair low <= high")
    return ends


def _squares(seed: int, positions: Tensor, height: int, width: int, share: Tensor) -> Tensor:
    """Squares of an eighth of the shorter side at random places; the border cuts them."""
    side = max(1, min(height, width) // 8)
    # each place has a time; a pixel gets the time of the first square that covers it: a minimum over a window
    times = uniform(seed, 0, "holes/squares", positions, (1, height + side - 1, width + side - 1))
    return _least(_least(times, side, 2), side, 3)  # (B, 1, H, W)


def _least(x: Tensor, width: int, dim: int) -> Tensor:
    """Minima over windows of ``width`` along a dimension; windows double in each round."""
    done = 1
    while done < width:
        shift = min(done, width - done)
        x = torch.minimum(x.narrow(dim, 0, x.shape[dim] - shift), x.narrow(dim, shift, x.shape[dim] - shift))
        done += shift
    return x


def _box(seed: int, positions: Tensor, height: int, width: int, share: Tensor) -> Tensor:
    """One rectangle that grows from a point; its aspect is 1:2 to 2:1 if that fits."""
    aspect, y, x = uniform(seed, 0, "holes/box", positions, (3,)).unbind(1)
    tall = (share * 2 ** (2 * aspect - 1)).sqrt().clamp(max=1).maximum(share)  # relative to the image
    wide = share / tall
    centre_y, centre_x = tall / 2 + y * (1 - tall), wide / 2 + x * (1 - wide)  # the whole box is inside
    dy = (_centres(height, positions) - centre_y[:, None]).abs() / tall[:, None]  # (B, H)
    dx = (_centres(width, positions) - centre_x[:, None]).abs() / wide[:, None]  # (B, W)
    return torch.maximum(dy[:, :, None], dx[:, None, :])


def _half(seed: int, positions: Tensor, height: int, width: int, share: Tensor) -> Tensor:
    """Rows or columns from one of the four sides."""
    side = (4 * uniform(seed, 0, "holes/half", positions)).long()[:, None, None]  # (B, 1, 1)
    y, x = _centres(height, positions)[:, None], _centres(width, positions)[None, :]
    depth = torch.where(side < 2, y, x)  # (B, H, W)
    return torch.where(side % 2 == 0, depth, -depth)


def _checkerboard(seed: int, positions: Tensor, height: int, width: int, share: Tensor) -> Tensor:
    """Cells of one colour in random order, then those of the other; a ratio of ½ gives the regular checkerboard."""
    phase = (2 * uniform(seed, 0, "holes/phase", positions)).long()[:, None, None]  # which colour comes first
    order = uniform(seed, 0, "holes/checkerboard", positions, (_CELLS, _CELLS))
    index = torch.arange(_CELLS, device=positions.device)
    order = order + (index[:, None] + index + phase) % 2
    rows = torch.arange(height, device=positions.device) * _CELLS // height
    columns = torch.arange(width, device=positions.device) * _CELLS // width
    return order[:, rows][:, :, columns]  # (B, 8, 8) -> (B, H, W)


def _free_form(seed: int, positions: Tensor, height: int, width: int, share: Tensor) -> Tensor:
    """Random walks of brushes of different thickness, which grow until the share is reached."""
    batch = len(positions)
    start = uniform(seed, 0, "holes/start", positions, (_STROKES, 2))
    brush = 0.5 + uniform(seed, 0, "holes/brush", positions, (_STROKES,))
    turns = normal(seed, 0, "holes/turns", positions, (_STROKES, _SEGMENTS)) * 0.8
    heading = 2 * math.pi * uniform(seed, 0, "holes/heading", positions, (_STROKES, 1)) + turns.cumsum(2)
    # longer strokes for a larger share, so that the thickness stays near _BRUSH
    length = (share / (_BRUSH * _STROKES * _SEGMENTS))[:, None, None]
    steps = torch.stack([heading.sin(), heading.cos()], dim=3) * length[..., None]  # (B, strokes, segments, 2)
    points = torch.cat([start[:, :, None], start[:, :, None] + steps.cumsum(2)], dim=2)
    points = 1 - (points.remainder(2) - 1).abs()  # the sides reflect
    y, x = _centres(height, positions)[:, None], _centres(width, positions)[None, :]
    nearest = torch.full((batch, height, width), math.inf, device=positions.device)
    for stroke in range(_STROKES):
        for segment in range(_SEGMENTS):
            square = _squared_distance(y, x, points[:, stroke, segment], points[:, stroke, segment + 1])
            nearest = torch.minimum(nearest, square / brush[:, stroke, None, None] ** 2)
    return nearest


def _mixed(seed: int, positions: Tensor, height: int, width: int, share: Tensor) -> Tensor:
    """One of the other patterns, each equally often: for models that fill holes of any pattern."""
    drawn = (len(_PURE) * uniform(seed, 0, "holes/law", positions)).long()[:, None, None]  # (B, 1, 1)
    fields = [pattern(seed, positions, height, width, share).reshape(-1, height, width) for pattern in _PURE.values()]
    return sum(torch.where(drawn == index, field, 0.0) for index, field in enumerate(fields))  # (B, H, W)


def _squared_distance(y: Tensor, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """From pixels y (H, 1), x (1, W) to segments from start (B, 2) to end (B, 2): (B, H, W)."""
    along = end - start
    along_y, along_x = along[:, 0, None, None], along[:, 1, None, None]
    dy, dx = y - start[:, 0, None, None], x - start[:, 1, None, None]  # (B, H, 1), (B, 1, W)
    square = (along_y**2 + along_x**2).clamp(min=1e-12)
    part = (dy * (along_y / square) + dx * (along_x / square)).clamp(0, 1)  # (B, H, W)
    return (dy - part * along_y) ** 2 + (dx - part * along_x) ** 2


def _centres(size: int, positions: Tensor) -> Tensor:
    """Centres of pixels in (0, 1): (size,)."""
    return (torch.arange(size, device=positions.device) + 0.5) / size


Pattern = Callable[[int, Tensor, int, int, Tensor], Tensor]
_PURE: dict[str, Pattern] = {
    "squares": _squares,
    "box": _box,
    "half": _half,
    "checkerboard": _checkerboard,
    "free-form": _free_form,
}
PATTERNS: dict[str, Pattern] = {**_PURE, "mixed": _mixed}
