"""Handwritten digits on textured grounds: several images of one digit per row, as PolyMNIST has them.

A stand-in, made on the spot, for PolyMNIST (Sutter et al., 2021, arXiv 2105.02470). The digits are those of
scikit-learn. The images of a row show different handwritings of the same digit. Each column has a kind of ground of its
own, so that its style says nothing about the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
from PIL import Image

from mmdiff.data.digits import HOLDOUT
from mmdiff.data.generated_rows import MadeRows
from mmdiff.errors import InputError
from mmdiff.randomness import fold

IMAGES = 5
CLASSES = 10
_DARKEST, _BRIGHTEST = 0.05, 0.35  # of a ground; the digit has the inverted colour


def load(rows: int = 10_000, validation_rows: int = 1000, size: int = 16, seed: int = 0) -> dict[str, TexturedDigits]:
    """{"train", "validation"} with columns image_0 … image_4 (RGB) and label.

    No handwriting is in both splits: the held-out rows of `mmdiff.data.digits` make the validation split.

    Args:
        rows, validation_rows: how many, 1 or more.
        size: height and width of the images in pixels, 8 … 256.
        seed: of digits and grounds.

    Raises:
        InputError: naming the option.
    """
    for key, value, least, most in (
        ("rows", rows, 1, 10**9),
        ("validation_rows", validation_rows, 1, 10**9),
        ("size", size, 8, 256),
        ("seed", seed, 0, 2**63 - 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise InputError(f"data.options.{key}", value, f"needs a whole number, {least} … {most}")
    return {
        split: TexturedDigits(split, count, size, seed)
        for split, count in (("train", rows), ("validation", validation_rows))
    }


class TexturedDigits(MadeRows):
    """Rows of one split; arguments as of `load`."""

    def __init__(self, split: str, rows: int, size: int, seed: int) -> None:
        images = {f"image_{k}": datasets.Image() for k in range(IMAGES)}
        label = datasets.ClassLabel(names=[str(k) for k in range(CLASSES)])
        super().__init__(rows, images | {"label": label})
        self.size, self._split = size, split
        self._keys = {name: fold(seed, 0, f"textured_digits/{split}/{name}") for name in (*images, "label")}

    def make(self, row: int, names: list[str]) -> dict[str, Any]:
        label = int(_random(self._keys["label"], row).integers(CLASSES))
        return {name: label if name == "label" else self._image(name, row, label) for name in names}

    def _image(self, name: str, row: int, label: int) -> Image.Image:
        random = _random(self._keys[name], row)
        written = _digits(self._split, self.size)[label]
        ink = written[random.integers(len(written)), ..., None]  # (size, size, 1) in [0, 1]
        ground = _ground(_TEXTURES[int(name.removeprefix("image_"))], self.size, random)
        return Image.fromarray(np.round(255 * ((1 - ink) * ground + ink * (1 - ground))).astype(np.uint8))


def _random(key: int, row: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[key, row]))


@functools.cache
def _digits(split: str, size: int) -> list[np.ndarray]:
    """For each class its digits, (n, size, size) in [0, 1]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    held_out = np.arange(len(digits.target)) % HOLDOUT == HOLDOUT - 1
    chosen = held_out if split == "validation" else ~held_out
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[chosen]
    large = [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in pixels]
    images = np.stack(large) / 255
    return [images[digits.target[chosen] == label] for label in range(CLASSES)]


def _ground(texture: Callable[..., np.ndarray], size: int, random: np.random.Generator) -> np.ndarray:
    """(size, size, 3): two random dark colours, mixed by the texture."""
    colours = random.uniform(_DARKEST, _BRIGHTEST, (2, 3))
    mix = texture(size, random)[..., None]
    return (1 - mix) * colours[0] + mix * colours[1]


# ------------------------------------------------------------------------------------------- textures, (size, size)


def _stripes(size: int, random: np.random.Generator) -> np.ndarray:
    angle, phase = random.uniform(0, np.pi), random.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] / size
    return (np.sin(6 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) + phase) > 0).astype(float)


def _checks(size: int, random: np.random.Generator) -> np.ndarray:
    shift = random.integers(0, size, 2)
    side = max(1, size // 6)
    y, x = np.mgrid[:size, :size]
    return ((((y + shift[0]) // side) + ((x + shift[1]) // side)) % 2).astype(float)


def _rings(size: int, random: np.random.Generator) -> np.ndarray:
    centre = random.uniform(0, 1, 2)
    y, x = np.mgrid[:size, :size] / size
    return (np.sin(8 * np.pi * np.hypot(y - centre[0], x - centre[1])) + 1) / 2


def _speckle(size: int, random: np.random.Generator) -> np.ndarray:
    return random.uniform(0, 1, (size, size))


def _clouds(size: int, random: np.random.Generator) -> np.ndarray:
    coarse = Image.fromarray(random.uniform(0, 255, (4, 4)).astype(np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255


_TEXTURES: tuple[Callable[..., np.ndarray], ...] = (_stripes, _checks, _rings, _speckle, _clouds)  # of image_0 …
