"""ImageSets of photos with what is asked about them, at any number of photos and share of distractors."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import datasets
from PIL import Image as PILImage

from mmdiff.benchmarks.fusion.settings import SetData, Settings, Task
from mmdiff.data import Rows
from mmdiff.data.sources import open_splits
from mmdiff.errors import InputError
from mmdiff.modalities.pictures import flat, loaded

Photos = list[PILImage.Image]


class ImageSets(NamedTuple):
    """B sets: ``photos``, which of them are ``distractors``, and {task: the B right answers}."""

    photos: list[Photos]
    distractors: list[list[bool]]
    answers: dict[str, list[str]]


def training_sets(settings: Settings) -> ImageSets:
    """The training rows, with the law that the options state."""
    return _read(settings, *_rows(settings.data, settings.data.options, held_out=False))


def single_photos(settings: Settings) -> ImageSets:
    """The training rows with one photo each, which is right."""
    return _read(settings, *_rows(settings.data, _with_law(settings.data, 1, 0.0), held_out=False))


def held_out_sets(settings: Settings, views: int, share: float) -> ImageSets:
    """The first held-out rows with ``views`` photos each, of which a share (rounded at random) are distractors."""
    rows, features = _rows(settings.data, _with_law(settings.data, views, share), held_out=True)
    return _read(settings, rows, features, settings.test.rows)


def front_views(settings: Settings) -> dict[str, PILImage.Image]:
    """{answer: the front view of a held-out object}, of every one among the first held-out rows."""
    data = settings.data
    ((_, task),) = settings.tasks.items()
    rows, features = _rows(data, data.options, held_out=True)
    _check_columns(rows, (data.front, *task.columns))
    chosen, views = rows.select_columns(sorted({data.front, *task.columns})), {}
    for index in range(min(settings.test.rows, len(chosen))):
        row = chosen[index]
        if None not in row.values():
            views.setdefault(_answer(row, task, features), square(row[data.front], data.size))
    return views


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


def _with_law(data: SetData, views: int, share: float) -> dict[str, Any]:
    """The options with another law of image sets; the source shapes has it in a section of its own."""
    options = copy.deepcopy(data.options)
    law = options["image_sets"] if isinstance(options.get("image_sets"), dict) else options
    law |= {"views": views, "distractors": share}
    return options


def _rows(data: SetData, options: dict[str, Any], held_out: bool) -> tuple[Rows, Any]:
    rows = open_splits(data.source, data.split, data.validation_split, options=options)[int(held_out)]
    return rows, rows.features


def _read(settings: Settings, rows: Rows, features: Any, limit: int | None = None) -> ImageSets:
    data = settings.data
    columns = {name for task in settings.tasks.values() for name in task.columns}
    _check_columns(rows, (data.photos, *sorted(columns)))
    marked = data.distractors in rows.column_names
    chosen = rows.select_columns(sorted({data.photos, *columns, *([data.distractors] if marked else [])}))
    picked = [chosen[index] for index in range(len(chosen) if limit is None else min(limit, len(chosen)))]
    picked = [row for row in picked if row[data.photos] and None not in (row[name] for name in columns)]
    photos = [[square(photo, data.size) for photo in row[data.photos]] for row in picked]
    distractors = [row[data.distractors] if marked else [False] * len(row[data.photos]) for row in picked]
    answers = {name: [_answer(row, task, features) for row in picked] for name, task in settings.tasks.items()}
    return ImageSets(photos, distractors, answers)


def _check_columns(rows: Rows, wanted: tuple[str, ...]) -> None:
    for column in wanted:
        if column not in rows.column_names:
            raise InputError("fusion.data", column, f"the source has the columns {', '.join(rows.column_names)}")


def _answer(row: dict[str, Any], task: Task, features: Any) -> str:
    """The texts of the task's columns, with commas between several of them."""
    parts = [text for name in task.columns for text in _texts(row[name], features[name])]
    return " , ".join(parts).lower()


def _texts(value: Any, feature: Any) -> list[str]:
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return [feature.int2str(value) if isinstance(feature, datasets.ClassLabel) else str(value)]
