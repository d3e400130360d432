"""Sets of photos with the right answers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from PIL import Image as PILImage

from mmdiff.modalities.pictures import flat, loaded

Photos = list[PILImage.Image]
NOTHING = ""  # the answer for a photo that shows no known object


class ImageSets(NamedTuple):
    """B sets: ``photos``, which of them are ``distractors``, and {task: the B right ``answers``}.

    ``shown`` is {task: the right answer for each photo by itself}, `NOTHING` where that is not known; ``questions`` is
    {task: what the B sets are asked}.
    """

    photos: list[Photos]
    distractors: list[list[bool]]
    answers: dict[str, list[str]]
    shown: dict[str, list[list[str]]]
    questions: dict[str, list[str]]


def own_photos(sets: ImageSets) -> ImageSets:
    """Without the distractors."""
    keep = [[index for index, flag in enumerate(flags) if not flag] for flags in sets.distractors]

    def kept(column: list[list[Any]]) -> list[list[Any]]:
        return [[members[index] for index in chosen] for members, chosen in zip(column, keep, strict=True)]

    shown = {task: kept(column) for task, column in sets.shown.items()}
    return sets._replace(photos=kept(sets.photos), distractors=kept(sets.distractors), shown=shown)


def one_large(photos: Photos) -> PILImage.Image:
    """The photos of a set side by side, in a square of as many rows as columns; what is left is grey."""
    side = math.ceil(math.sqrt(len(photos)))
    width, height = photos[0].size
    large = PILImage.new("RGB", (side * width, side * height), (128, 128, 128))
    for index, photo in enumerate(photos):
        large.paste(photo, (index % side * width, index // side * height))
    return large


def square(photo: Any, size: int) -> PILImage.Image:
    """In colour, and as large as asked for."""
    picture = flat(loaded("photo", photo), 3, (255, 255, 255))
    return picture if picture.size == (size, size) else picture.resize((size, size), PILImage.Resampling.BICUBIC)
