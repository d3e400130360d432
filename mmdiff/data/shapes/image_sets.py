"""Shapes with an image set per object: each photo shows a part of it elsewhere, and some photos show other objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import datasets
import numpy as np
from PIL import Image

from mmdiff.data.image_sets import checked_ranges, drawn_counts
from mmdiff.data.shapes import render as shapes
from mmdiff.data.shapes.occlusion import OccludedShapes, checked
from mmdiff.data.shapes.render import COLORS, OCCLUDER, SHAPES, Shapes, Thing, draw_place, render, row_uniform
from mmdiff.errors import InputError, at
from mmdiff.randomness import fold

FRONT = (0.5, 0.5, 0.3)  # x, y and radius of the front view
_DRAWN = 12  # uniform numbers per photo
_DARK = 0.25  # brightness of the dark stripes
_KINDS = datasets.ClassLabel(names=[f"{color} {shape}" for shape in SHAPES for color in COLORS])


class ImageSets(NamedTuple):
    """How image sets are drawn.

    Attributes:
        views: least and largest number of photos, drawn uniformly.
        visible: side of the window through which the object is seen, in units of its radius; 2 shows all of it. The
            rest of its bounding square is grey.
        distractors: range of the share of photos of other objects, drawn uniformly; one photo is always of the object.
        strangers: whether other objects have a striped surface, so that a distractor can be recognised alone; else only
            the other photos of the set tell.
    """

    views: tuple[int, int] = (1, 6)
    visible: float = 0.7
    distractors: tuple[float, float] = (0.0, 0.0)
    strangers: bool = True


class Photo(NamedTuple):
    """The content of a photo; ``backdrop`` and ``window`` are uniform numbers."""

    thing: Thing
    distractor: bool
    backdrop: np.ndarray
    window: np.ndarray


class ShapeSets(Shapes):
    """Rows of shapes with further columns.

    ``photos``: images of an object of the row's shape and colour at other places and scales, and of other objects;
    ``distractors``: which photos show other objects; ``objects``: shape and colour in each photo, as one class;
    ``front``: the whole object, in the centre; ``kind``: shape and colour as one class; ``description``: for example
    "a red circle".

    Args:
        split, rows, size, views, seed: see `Shapes`.
        image_sets: how image sets are drawn.
    """

    def __init__(self, split: str, rows: int, size: int, views: int, seed: int, image_sets: ImageSets) -> None:
        super().__init__(split, rows, size, views, seed)
        self.image_sets = image_sets
        self._keys["image_sets"] = fold(seed, 0, f"shapes/{split}/bags")

    def _members(self, row: int, thing: Thing) -> list[Photo]:
        most = self.image_sets.views[1]
        uniform = row_uniform(self._keys["image_sets"], row, 3 + _DRAWN * most)
        count, others = drawn_counts(self.image_sets.views, self.image_sets.distractors, uniform)
        each = uniform[3:].reshape(most, _DRAWN)[:count]
        foreign = each[:, 0].argsort(kind="stable").argsort(kind="stable") < others
        return [_photo(thing, bool(other), numbers) for other, numbers in zip(foreign, each)]

    def _photos(self, row: int, thing: Thing, backdrop: np.ndarray) -> list[Image.Image]:
        return [self._picture(photo) for photo in self._members(row, thing)]

    def _distractors(self, row: int, thing: Thing, backdrop: np.ndarray) -> list[bool]:
        return [photo.distractor for photo in self._members(row, thing)]

    def _objects(self, row: int, thing: Thing, backdrop: np.ndarray) -> list[int]:
        return [_kind(photo.thing) for photo in self._members(row, thing)]

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
        "objects": _objects,
        "front": _front,
        "kind": lambda rows, row, thing, backdrop: _kind(thing),
        "description": lambda rows, row, thing, backdrop: f"a {COLORS[thing.color]} {SHAPES[thing.label]}",
    }
    types: ClassVar[dict[str, Any]] = Shapes.types | {
        "photos": datasets.List(datasets.Image()),
        "distractors": datasets.List(datasets.Value("bool")),
        "objects": datasets.List(_KINDS),
        "front": datasets.Image(),
        "kind": _KINDS,
        "description": datasets.Value("string"),
    }


def load(
    rows: int = 20000,
    validation_rows: int = 1000,
    size: int = 32,
    views: int = 4,
    seed: int = 0,
    image_sets: Mapping[str, Any] | None = None,
    occlusion: Mapping[str, Any] | None = None,
) -> dict[str, Shapes]:
    """{"train", "validation"}, see `Shapes`; with the fields of `ImageSets` also the columns of `ShapeSets`, with those
    of `Occlusion` the images of `OccludedShapes`.

    Raises:
        InputError: as of `shapes.load`; for image sets of no photo, of distractors only, or without a window; for
            numbers that are no shares, and an occlusion beside image sets.
    """
    plain = shapes.load(rows, validation_rows, size, views, seed)
    if occlusion is not None:
        if image_sets is not None:
            raise InputError("occlusion", occlusion, "is of shapes without image_sets; leave one out")
        hidden = checked(occlusion)
        return {split: OccludedShapes(split, len(rows), size, views, seed, hidden) for split, rows in plain.items()}
    if image_sets is None:
        return plain
    settings = ImageSets(**image_sets)
    with at("image_sets"):
        sizes, shares = checked_ranges(settings.views, settings.distractors)
    if not 0 < settings.visible <= 2:
        raise InputError("image_sets.visible", settings.visible, "is the window's side in radii, 0 < visible <= 2")
    settings = settings._replace(views=sizes, distractors=shares)
    return {split: ShapeSets(split, len(rows), size, views, seed, settings) for split, rows in plain.items()}


def _kind(thing: Thing) -> int:
    return thing.label * len(COLORS) + thing.color


def _photo(thing: Thing, distractor: bool, uniform: np.ndarray) -> Photo:
    kind = _kind(thing)
    if distractor:  # another kind, uniformly
        kinds = len(SHAPES) * len(COLORS)
        kind = (kind + 1 + int(uniform[1] * (kinds - 1))) % kinds
    label, color = divmod(kind, len(COLORS))
    return Photo(Thing(label, color, *draw_place(uniform[2:5])), distractor, uniform[5:8], uniform[8:10])


def _hidden(photo: Photo, visible: float, size: int) -> np.ndarray:
    """(size, size) bool: the object's bounding square without a window at a random place in it."""
    thing, centres = photo.thing, (np.arange(size) + 0.5) / size
    half = visible * thing.radius / 2
    shift = (2 * photo.window - 1) * (thing.radius - half)
    across, down = np.abs(centres - thing.x), np.abs(centres - thing.y)
    square = (down[:, None] <= thing.radius + 1 / size) & (across <= thing.radius + 1 / size)
    across, down = np.abs(centres - thing.x - shift[0]), np.abs(centres - thing.y - shift[1])
    window = (down[:, None] <= half + (visible >= 2) / size) & (across <= half + (visible >= 2) / size)
    return square & ~window


def _stripes(size: int) -> np.ndarray:
    """(size, size): diagonals two pixels wide, bright and dark in turn."""
    place = np.arange(size)
    return np.where((place[:, None] + place) // 2 % 2, 1.0, _DARK)
