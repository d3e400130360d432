"""Image sets from a data set with one image per row and a column that names its object."""

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

PHOTOS, DISTRACTORS, OBJECTS = "photos", "distractors", "objects"


class ImageSets(MadeRows):
    """Rows of one split.

    A row is the first row of an object (its front view, which is in no set) with three further columns: ``photos``,
    other views of it in random order; ``distractors``, which of the photos show other objects; ``objects``, what each
    photo shows. Objects take turns, so that each has as many rows as the others.

    Args:
        base: rows of the source.
        image, object: its columns of images and of what they show.
        fronts: the row in ``base`` of each object's front view.
        views: the rows of each object's other views in this split.
        rows: how many image sets.
        sizes: least and largest number of images, drawn uniformly; an object with fewer views gives all of them.
        distractors: range of the share of images of other objects, drawn uniformly; one image is always of the object.
        key: seed of the random numbers.
    """

    def __init__(
        self,
        base: Any,
        image: str,
        object: str,
        fronts: list[int],
        views: list[list[int]],
        rows: int,
        sizes: tuple[int, int],
        distractors: tuple[float, float],
        key: int,
    ) -> None:
        images, flags = datasets.List(datasets.Image()), datasets.List(datasets.Value("bool"))
        types = {PHOTOS: images, DISTRACTORS: flags, OBJECTS: datasets.List(base.features[object])}
        super().__init__(rows, {**base.features, **types})
        self.base, self.image, self.object, self.fronts, self.views = base, image, object, fronts, views
        self.sizes, self.shares, self._key = sizes, distractors, key

    def make(self, row: int, names: list[str]) -> dict[str, Any]:
        thing = row % len(self.fronts)
        made = {PHOTOS, DISTRACTORS, OBJECTS} & set(names)
        kept = [name for name in names if name in self.base.column_names and name not in made]
        columns: dict[str, Any] = dict(self.base.select_columns(kept)[self.fronts[thing]]) if kept else {}
        if made:
            members, columns[DISTRACTORS] = self._members(row, thing)
            for name, column in ((PHOTOS, self.image), (OBJECTS, self.object)):
                if name in made:
                    values = self.base.select_columns([column])
                    columns[name] = [values[member][column] for member in members]
        return {name: columns[name] for name in names}

    def _members(self, row: int, thing: int) -> tuple[list[int], list[bool]]:
        """(rows in the source, which of them show other objects)."""
        most, views = self.sizes[1], self.views[thing]
        uniform = row_uniform(self._key, row, 3 + 3 * most)
        count, others = drawn_counts(self.sizes, self.shares, uniform)
        others = others if len(self.fronts) > 1 else 0
        each = uniform[3:].reshape(3, most)
        photos = _without_repeats(each[0], views, min(count - others, len(views)))
        members = [*photos, *(self._foreign(thing, float(u)) for u in each[1, :others])]
        order = each[2, : len(members)].argsort(kind="stable")
        return [members[k] for k in order], [bool(k >= len(photos)) for k in order]

    def _foreign(self, thing: int, uniform: float) -> int:
        """A view of another object: all objects equally likely, then all of its views."""
        place = uniform * (len(self.fronts) - 1)
        other = self.views[(thing + 1 + int(place)) % len(self.fronts)]
        return other[int((place - int(place)) * len(other))]


def drawn_counts(sizes: tuple[int, int], shares: tuple[float, float], uniform: np.ndarray) -> tuple[int, int]:
    """(number of images, number of distractors among them) from three uniform numbers."""
    (least, most), (low, high) = sizes, shares
    count = least + int(uniform[0] * (most - least + 1))
    return count, min(int((low + (high - low) * uniform[1]) * count + uniform[2]), count - 1)


def _without_repeats(uniform: np.ndarray, items: list[int], count: int) -> list[int]:
    """The first ``count`` items of a random order (Fisher and Yates)."""
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
        object, image: the names of these columns.
        split: the split to read.
        views: images per set, one number or the least and the largest.
        rows, validation_rows: how many image sets.
        hold_out: "views": every k-th view of every object is in validation sets only; "objects": every k-th object is,
            so that retrieval is measured on new objects.
        every: k.
        distractors: share of images of other objects, or its range.
        seed: of the image sets.

    Raises:
        InputError: for a column that is not there, a number that does not fit, or a split without objects.
    """
    sizes, shares = checked_ranges(views, distractors)
    _check(hold_out, every, rows, validation_rows)
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
    several = [group for group in groups.values() if len(group) > 1]  # a front view and at least one other

    def image_sets(name: str, count: int, chosen: list[tuple[int, list[int]]]) -> ImageSets:
        chosen = [(front, others) for front, others in chosen if others]
        if not chosen:
            raise InputError("object", object, f"leaves no object for {name}: each needs a first row and further ones")
        fronts, others = (list(part) for part in zip(*chosen))
        return ImageSets(base, image, object, fronts, others, count, sizes, shares, fold(seed, 0, f"bags/{name}"))

    def kept(items: list[Any], held: bool) -> list[Any]:
        return [item for k, item in enumerate(items) if (k % every == every - 1) == held]

    parts = {}
    for name, count, held in (("train", rows, False), ("validation", validation_rows, True)):
        objects = kept(several, held) if hold_out == "objects" else several
        others = [group[1:] if hold_out == "objects" else kept(group[1:], held) for group in objects]
        parts[name] = image_sets(name, count, [(group[0], rest) for group, rest in zip(objects, others)])
    return parts


def checked_ranges(views: Any, distractors: Any) -> tuple[tuple[int, int], tuple[float, float]]:
    """(sizes, shares) as ranges, each from one number or two.

    Raises:
        InputError: naming views or distractors.
    """
    sizes, shares = (tuple(v) if isinstance(v, list | tuple) else (v, v) for v in (views, distractors))
    if len(sizes) != 2 or not all(isinstance(count, int) for count in sizes) or not 1 <= sizes[0] <= sizes[1]:
        raise InputError("views", views, "needs the number of images, 1 at least, or the least and the largest")
    if len(shares) != 2 or not all(isinstance(s, int | float) for s in shares) or not 0 <= shares[0] <= shares[1] < 1:
        raise InputError("distractors", distractors, "needs a share, or a range of shares, 0 <= low <= high < 1")
    return sizes, shares


def _check(hold_out: str, every: int, rows: int, validation_rows: int) -> None:
    if hold_out not in ("views", "objects"):
        raise InputError("hold_out", hold_out, "choose views or objects")
    for key, value, least in (("every", every, 2), ("rows", rows, 1), ("validation_rows", validation_rows, 1)):
        if value < least:
            raise InputError(key, value, f"needs at least {least}")
