"""ImageSets of views: a data set with one image per row and a column that names its object becomes sets of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from mmdiff.data.files import undecoded
from mmdiff.data.generated_rows import MadeRows
from mmdiff.data.shapes.render import row_uniform
from mmdiff.errors import InputError
from mmdiff.randomness import fold

PHOTOS, DISTRACTORS = "photos", "distractors"
_TYPES = {PHOTOS: datasets.List(datasets.Image()), DISTRACTORS: datasets.List(datasets.Value("bool"))}


class ImageSets(MadeRows):
    """Rows of one split.

    Each is the first row of an object (its front view, which is in no set) with two further columns: ``photos``, a list
    of other views of it in random order, and ``distractors``, which of them are views of other objects. Objects take
    turns, so that every one of them has as many rows as the others.

    Args:
        base: rows of the source.
        image: its column of images.
        fronts: the row in ``base`` of each object's front view.
        views: the rows of each object's other views in this split.
        rows: how many image_sets.
        sizes: least and largest number of images, all equally likely; an object with fewer views shows those.
        distractors: range of the share of images that are of other objects, uniform; one image is always right.
        key: of the random numbers.
    """

    def __init__(
        self,
        base: Any,
        image: str,
        fronts: list[int],
        views: list[list[int]],
        rows: int,
        sizes: tuple[int, int],
        distractors: tuple[float, float],
        key: int,
    ) -> None:
        super().__init__(rows, {**base.features, **_TYPES})
        self.base, self.image, self.fronts, self.views = base, image, fronts, views
        self.sizes, self.shares, self._key = sizes, distractors, key

    def make(self, row: int, names: list[str]) -> dict[str, Any]:
        thing = row % len(self.fronts)
        kept = [name for name in names if name in self.base.column_names]
        found: dict[str, Any] = dict(self.base.select_columns(kept)[self.fronts[thing]]) if kept else {}
        if {PHOTOS, DISTRACTORS} & set(names):
            members, found[DISTRACTORS] = self._members(row, thing)
            if PHOTOS in names:
                images = self.base.select_columns([self.image])
                found[PHOTOS] = [images[member][self.image] for member in members]
        return {name: found[name] for name in names}

    def _members(self, row: int, thing: int) -> tuple[list[int], list[bool]]:
        """(rows in the source, which of them are of other objects)."""
        (least, most), (low, high) = self.sizes, self.shares
        uniform = row_uniform(self._key, row, 3 + 3 * most)
        own, header, each = self.views[thing], uniform[:3], uniform[3:].reshape(3, most)
        count = least + int(header[0] * (most - least + 1))
        others = (
            min(int((low + (high - low) * header[1]) * count + header[2]), count - 1) if len(self.fronts) > 1 else 0
        )
        right = _without_repeats(each[0], own, min(count - others, len(own)))
        wrong = [self._foreign(thing, float(u)) for u in each[1, :others]]
        members = [*right, *wrong]
        order = each[2, : len(members)].argsort(kind="stable")
        return [members[k] for k in order], [bool(k >= len(right)) for k in order]

    def _foreign(self, thing: int, uniform: float) -> int:
        """A view of another object: all objects equally likely, then all of its views."""
        place = uniform * (len(self.fronts) - 1)
        other = self.views[(thing + 1 + int(place)) % len(self.fronts)]
        return other[int((place - int(place)) * len(other))]


def _without_repeats(uniform: np.ndarray, items: list[int], count: int) -> list[int]:
    """The first ``count`` of a random order (Fisher and Yates)."""
    items = list(items)
    for k in range(count):
        other = k + int(uniform[k] * (len(items) - k))
        items[k], items[other] = items[other], items[k]
    return items[:count]


def load(
    splits: Mapping[str, Any],
    object: str = "object",
    image: str = "image",
    split: str = "train",
    views: int | Sequence[int] = (1, 6),
    rows: int = 2000,
    validation_rows: int = 500,
    hold_out: str = "views",
    every: int = 6,
    distractors: float | Sequence[float] = 0.0,
    seed: int = 0,
) -> dict[str, ImageSets]:
    """{"train", "validation"} of image sets, see `ImageSets`.

    Args:
        splits: of a source with an image and an object per row; rows without an object are left out.
        object, image: its columns.
        split: which one of them.
        views: images per set, one number or the least and the largest.
        rows, validation_rows: how many image_sets.
        hold_out: "views": every k-th view of every object is in validation sets only; "objects": every k-th object, for
            retrieval of things that training never saw.
        every: k.
        distractors: share of images of other objects, or its range.
        seed: of the image_sets.

    Raises:
        InputError: for a column that is not there, a number that does not fit, or a split without objects.
    """
    sizes, shares = _checked(views, distractors, hold_out, every, rows, validation_rows)
    if split not in splits:
        raise InputError("split", split, f"the source has the splits {', '.join(splits)}")
    base = undecoded(splits[split])
    for key, column in (("object", object), ("image", image)):
        if column not in base.column_names:
            raise InputError(key, column, f"the source has {', '.join(base.column_names)}")
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(base.select_columns([object])):
        if row[object] is not None:
            groups.setdefault(row[object], []).append(index)
    seen = [group for group in groups.values() if len(group) > 1]  # a front view and another one

    def image_sets(name: str, count: int, chosen: list[tuple[int, list[int]]]) -> ImageSets:
        chosen = [(front, others) for front, others in chosen if others]
        if not chosen:
            raise InputError("object", object, f"leaves no object for {name}: each needs a first row and further ones")
        fronts, others = (list(part) for part in zip(*chosen))
        return ImageSets(base, image, fronts, others, count, sizes, shares, fold(seed, 0, f"bags/{name}"))

    def kept(items: list[Any], held: bool) -> list[Any]:
        return [item for k, item in enumerate(items) if (k % every == every - 1) == held]

    parts = {}
    for name, count, held in (("train", rows, False), ("validation", validation_rows, True)):
        own = kept(seen, held) if hold_out == "objects" else seen
        others = [group[1:] if hold_out == "objects" else kept(group[1:], held) for group in own]
        parts[name] = image_sets(name, count, [(group[0], rest) for group, rest in zip(own, others)])
    return parts


def _checked(
    views: Any, distractors: Any, hold_out: str, every: int, rows: int, validation_rows: int
) -> tuple[tuple[int, int], tuple[float, float]]:
    """(sizes, shares) as ranges."""
    sizes = tuple(views) if isinstance(views, Sequence) else (views, views)
    shares = tuple(distractors) if isinstance(distractors, Sequence) else (distractors, distractors)
    if len(sizes) != 2 or not all(isinstance(count, int) for count in sizes) or not 1 <= sizes[0] <= sizes[1]:
        raise InputError("views", views, "needs the number of images, 1 at least, or the least and the largest")
    if len(shares) != 2 or not 0 <= shares[0] <= shares[1] < 1:
        raise InputError("distractors", distractors, "needs a share, or a range of shares, 0 <= low <= high < 1")
    if hold_out not in ("views", "objects"):
        raise InputError("hold_out", hold_out, "choose views or objects")
    for key, value, least in (("every", every, 2), ("rows", rows, 1), ("validation_rows", validation_rows, 1)):
        if value < least:
            raise InputError(key, value, f"needs at least {least}")
    return sizes, shares
