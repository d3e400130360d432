"""A random change of a row that keeps its meaning: a crop, flips and colours, by torchvision.

`mmdiff.data.augment` draws changes; the method `follow` of a modality says what a change does to its values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

NEAREST, BICUBIC = InterpolationMode.NEAREST_EXACT, InterpolationMode.BICUBIC
WHOLE = (0.0, 0.0, 1.0, 1.0)


class Change(NamedTuple):
    """What happens to one row, in this order.

    ``box``: (top, left, height, width) of the part that is kept and brought back to the size, as parts of the sides.
    ``flip`` exchanges left and right, ``vertical_flip`` top and bottom. ``brightness``, ``contrast`` and ``saturation``
    are factors (1: none), ``hue`` is a part of the colour circle in [−½, ½].
    """

    box: tuple[float, float, float, float] = WHOLE
    flip: bool = False
    vertical_flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


def moved(value: Tensor, change: Change, by: InterpolationMode) -> Tensor:
    """A map (…, h, w) after the crop and the flips of a change; its shape and dtype stay.

    Args:
        value: of any numbers of leading dimensions.
        change: of its row.
        by: how the kept part is brought back to the size: `NEAREST` keeps the numbers that there are, `BICUBIC` (with
            antialiasing) is for pictures and overshoots.
    """
    height, width = value.shape[-2:]
    if change.box != WHOLE:
        (top, rows), (left, columns) = (_pixels(*change.box[axis::2], side) for axis, side in ((0, height), (1, width)))
        part = value[..., top : top + rows, left : left + columns].reshape(1, -1, rows, columns)
        part = functional.resize(part, [height, width], by, antialias=by is not NEAREST)
        value = part.reshape(value.shape)
    value = functional.horizontal_flip(value) if change.flip else value
    return functional.vertical_flip(value) if change.vertical_flip else value


def _pixels(start: float, part: float, side: int) -> tuple[int, int]:
    """(first, number) of the pixels of a part of a side."""
    count = max(1, round(part * side))
    return min(round(start * side), side - count), count


def recoloured(value: Tensor, change: Change) -> Tensor:
    """Images (…, channels, h, w) in [−1, 1] after the colours of a change; a grey image has no saturation and hue."""
    pixels = (value + 1) / 2
    if change.brightness != 1:
        pixels = functional.adjust_brightness(pixels, change.brightness)
    if change.contrast != 1:
        pixels = _contrasted(pixels, change.contrast)
    if change.saturation != 1:
        pixels = functional.adjust_saturation(pixels, change.saturation)
    if change.hue != 0:
        pixels = functional.adjust_hue(pixels, change.hue)
    return value if change[3:] == Change()[3:] else pixels * 2 - 1


def _contrasted(pixels: Tensor, factor: float) -> Tensor:
    """torchvision's `adjust_contrast`, whose sum over the pixels depends on the number of threads."""
    grey = functional.rgb_to_grayscale(pixels).numpy().mean(axis=(-3, -2, -1), keepdims=True, dtype="float64")
    return (factor * pixels + (1 - factor) * torch.from_numpy(grey).to(pixels)).clamp(0, 1)
