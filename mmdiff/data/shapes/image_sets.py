"""Shapes with a set of photos per object: each shows a part of it somewhere else, and some show something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import datasets
import numpy as np
from PIL import Image

from mmdiff.data.shapes import render as shapes
from mmdiff.data.shapes.render import COLORS, OCCLUDER, SHAPES, Shapes, Thing, draw_place, render, row_uniform
from mmdiff.errors import InputError
from mmdiff.randomness import fold

FRONT = (0.5, 0.5, 0.3)  # x, y and radius of the front view
_DRAWN = 12  # uniform numbers of a photo
_DARK = 0.25  # brightness of a stranger's stripes


class ImageSets(NamedTuple):
    """How image sets are drawn.

    Attributes:
        views: least and largest number of photos, all equally likely.
        visible: side of the window through which the object is seen, in units of its radius, so that 2 shows all of it;
            the rest of its bounding square is grey.
        distractors: range of the share of photos that show another object, uniform; one photo is always right.
        strangers: whether such objects have a striped surface, so that every photo says by itself that it does not
            belong; else they are objects of other attributes, and only the rest of the set says so.
    """

    views: tuple[int, int] = (1, 6)
    visible: float = 0.7
    distractors: tuple[float, float] = (0.0, 0.0)
    strangers: bool = True


class Photo(NamedTuple):
    """What is in a photo: ``backdrop`` and ``window`` are uniform numbers."""

    thing: Thing
    distractor: bool
    backdrop: np.ndarray
    window: np.ndarray


class ShapeSets(Shapes):
    """Rows of shapes with further columns.

    ``photos``: a list of images of an object of the row's shape and colour at other places and scales, and of others;
    ``distractors``: which are of others; ``front``: the object whole, in the centre; ``kind``: shape and colour as one
    class; ``description``: for example "a red circle".

    Args:
        split, rows, size, views, seed: see `Shapes`.
        image_sets: how they are drawn.
    """

    def __init__(self, split: str, rows: int, size: int, views: int, seed: int, image_sets: ImageSets) -> None:
        super().__init__(split, rows, size, views, seed)
        self.image_sets = image_sets
        self._keys["image_sets"] = fold(seed, 0, f"shapes/{split}/bags")

    def _members(self, row: int, thing: Thing) -> list[Photo]:
        (least, most), (low, high) = self.image_sets.views, self.image_sets.distractors
        uniform = row_uniform(self._keys["image_sets"], row, 3 + _DRAWN * most)
        count = least + int(uniform[0] * (most - least + 1))
        others = min(int((low + (high - low) * uniform[1]) * count + uniform[2]), count - 1)
        each = uniform[3:].reshape(most, _DRAWN)[:count]
        foreign = each[:, 0].argsort(kind="stable").argsort(kind="stable") < others
        return [_photo(thing, bool(other), numbers) for other, numbers in zip(foreign, each)]

    def _photos(self, row: int, thing: Thing, backdrop: np.ndarray) -> list[Image.Image]:
        return [self._picture(photo) for photo in self._members(row, thing)]

    def _distractors(self, row: int, thing: Thing, backdrop: np.ndarray) -> list[bool]:
        return [photo.distractor for photo in self._members(row, thing)]

    def _picture(self, photo: Photo) -> Image.Image:
        striped = photo.distractor and self.image_sets.strangers
        pixels = render(photo.thing, photo.backdrop, self.size, _stripes(self.size) if striped else 1.0)
        pixels[_hidden(photo, self.image_sets.visible, self.size)] = OCCLUDER
        return Image.fromarray(pixels)

    def _front(self, row: int, thing: Thing, backdrop: np.ndarray) -> Image.Image:
        return Image.fromarray(render(Thing(thing.label, thing.color, *FRONT), backdrop, self.size))

    makers: ClassVar[dict[str, Callable[[Any, int, Thing, np.ndarray], Any]]] = Shapes.makers | {
        "photos": _photos,
        "distractors": _distractors,
        "front": _front,
        "kind": lambda rows, row, thing, backdrop: thing.label * len(COLORS) + thing.color,
        "description": lambda rows, row, thing, backdrop: f"a {COLORS[thing.color]} {SHAPES[thing.label]}",
    }
    types: ClassVar[dict[str, Any]] = Shapes.types | {
        "photos": datasets.List(datasets.Image()),
        "distractors": datasets.List(datasets.Value("bool")),
        "front": datasets.Image(),
        "kind": datasets.ClassLabel(names=[f"{color} {shape}" for shape in SHAPES for color in COLORS]),
        "description": datasets.Value("string"),
    }


def load(
    rows: int = 20000,
    validation_rows: int = 1000,
    size: int = 32,
    views: int = 4,
    seed: int = 0,
    image_sets: Mapping[str, Any] | None = None,
) -> dict[str, Shapes]:
    """{"train", "validation"}, see `Shapes`; with the fields of `ImageSets` also the columns of `ShapeSets`.

    Raises:
        InputError: as in `shapes.load`, and for image sets of no photo, of distractors only, or with nothing to see.
    """
    plain = shapes.load(rows, validation_rows, size, views, seed)
    if image_sets is None:
        return plain
    drawn = _checked(ImageSets(**image_sets))
    return {split: ShapeSets(split, len(own), size, views, seed, drawn) for split, own in plain.items()}


def _checked(given: ImageSets) -> ImageSets:
    views, shares = (_pair(name, value) for name, value in (("views", given.views), ("distractors", given.distractors)))
    if not (1 <= views[0] <= views[1] and all(isinstance(count, int) for count in views)):
        raise InputError(
            "image_sets.views", given.views, "needs the least and the largest number of photos, 1 at least"
        )
    if not 0 <= shares[0] <= shares[1] < 1:
        raise InputError("image_sets.distractors", given.distractors, "needs a range of shares, 0 <= low <= high < 1")
    if not 0 < given.visible <= 2:
        raise InputError("image_sets.visible", given.visible, "is the window's side in radii, 0 < visible <= 2")
    return given._replace(views=views, distractors=shares)


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    """One number, or a range."""
    ends = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(ends) != 2 or not all(isinstance(end, int | float) for end in ends):
        raise InputError(f"image_sets.{name}", value, "needs one number, or two: low and high")
    return ends


def _photo(thing: Thing, distractor: bool, uniform: np.ndarray) -> Photo:
    kind = thing.label * len(COLORS) + thing.color
    if distractor:  # any other, all equally likely
        kinds = len(SHAPES) * len(COLORS)
        kind = (kind + 1 + int(uniform[1] * (kinds - 1))) % kinds
    label, color = divmod(kind, len(COLORS))
    return Photo(Thing(label, color, *draw_place(uniform[2:5])), distractor, uniform[5:8], uniform[8:10])


def _hidden(photo: Photo, visible: float, size: int) -> np.ndarray:
    """(size, size) bool: the object's bounding square but for a window, anywhere inside of it."""
    thing, centres = photo.thing, (np.arange(size) + 0.5) / size
    half = visible * thing.radius / 2
    shift = (2 * photo.window - 1) * (thing.radius - half)
    across, down = np.abs(centres - thing.x), np.abs(centres - thing.y)
    square = (down[:, None] <= thing.radius + 1 / size) & (across <= thing.radius + 1 / size)
    across, down = np.abs(centres - thing.x - shift[0]), np.abs(centres - thing.y - shift[1])
    window = (down[:, None] <= half + (visible >= 2) / size) & (across <= half + (visible >= 2) / size)
    return square & ~window


def _stripes(size: int) -> np.ndarray:
    """(size, size): diagonals of four pixels, bright and dark in turn."""
    place = np.arange(size)
    return np.where((place[:, None] + place) // 2 % 2, 1.0, _DARK)
