"""Shapes of which a grey half-plane hides a part in the image, and nowhere else: the image does not tell the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import datasets
import numpy as np
from PIL import Image

from mmdiff.data.shapes.render import OCCLUDER, Shapes, Thing, coverage, render, row_uniform
from mmdiff.errors import InputError
from mmdiff.randomness import fold


class Occlusion(NamedTuple):
    """How objects are hidden.

    Attributes:
        share: of rows with a half-plane.
        hidden: range of the part of the object's area that it hides, drawn uniformly.
    """

    share: float = 0.5
    hidden: tuple[float, float] = (0.0, 1.0)


class OccludedShapes(Shapes):
    """Rows of shapes; ``image`` shows a half-plane of grey in front, mask, label, embedding and caption are of the
    whole object. One further column, ``hidden``: the part of the object's area that is hidden.

    Args:
        split, rows, size, views, seed: see `Shapes`.
        occlusion: how objects are hidden.
    """

    def __init__(self, split: str, rows: int, size: int, views: int, seed: int, occlusion: Occlusion) -> None:
        super().__init__(split, rows, size, views, seed)
        self.occlusion = occlusion
        self._keys["occlusion"] = fold(seed, 0, f"shapes/{split}/occlusion")

    def _behind(self, row: int, thing: Thing) -> np.ndarray:
        """(size, size) bool: the pixels of the half-plane."""
        chance, direction, part = row_uniform(self._keys["occlusion"], row, 3)
        if chance >= self.occlusion.share:
            return np.zeros((self.size, self.size), dtype=bool)
        centres, angle = (np.arange(self.size) + 0.5) / self.size, 2 * np.pi * direction
        along = np.cos(angle) * centres[None, :] + np.sin(angle) * centres[:, None]
        area = coverage(thing.label, thing.x, thing.y, thing.radius, self.size).ravel()
        order = along.ravel().argsort(kind="stable")
        low, high = self.occlusion.hidden
        wanted = (low + (high - low) * part) * area.sum()
        count = int(np.searchsorted(area[order].cumsum(), wanted))  # of the first pixels that hide no more than wanted
        return along < along.ravel()[order[count]] if count < len(order) else np.ones_like(along, dtype=bool)

    def _image(self, row: int, thing: Thing, backdrop: np.ndarray) -> Image.Image:
        pixels = render(thing, backdrop, self.size)
        pixels[self._behind(row, thing)] = OCCLUDER
        return Image.fromarray(pixels)

    def _hidden(self, row: int, thing: Thing, backdrop: np.ndarray) -> float:
        area = coverage(thing.label, thing.x, thing.y, thing.radius, self.size)
        return float(area[self._behind(row, thing)].sum() / area.sum())

    makers: ClassVar[dict[str, Callable[[Any, int, Thing, np.ndarray], Any]]] = Shapes.makers | {
        "image": _image,
        "hidden": _hidden,
    }
    types: ClassVar[dict[str, Any]] = Shapes.types | {"hidden": datasets.Value("float64")}


def checked(settings: Mapping[str, Any]) -> Occlusion:
    """The settings of a config.

    Raises:
        InputError: for an unknown key, and a number outside [0, 1].
    """
    if not isinstance(settings, Mapping):
        raise InputError("occlusion", settings, "needs {share: 0.5, hidden: [0, 1]}, or parts of it")
    for key in settings:
        if key not in Occlusion._fields:
            raise InputError(f"occlusion.{key}", settings[key], f"choose from {', '.join(Occlusion._fields)}")
    occlusion = Occlusion(**settings)
    share, hidden = occlusion
    pair = tuple(hidden) if isinstance(hidden, list | tuple) else ()
    if not _is_share(share):
        raise InputError("occlusion.share", share, "needs a number from 0 to 1")
    if len(pair) != 2 or not all(map(_is_share, pair)) or pair[0] > pair[1]:
        raise InputError("occlusion.hidden", hidden, "needs two numbers from 0 to 1, the least first")
    return Occlusion(float(share), (float(pair[0]), float(pair[1])))


def _is_share(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= 1
