"""Image sets are read from a source, at any number of photos and share of distractors."""

from __future__ import annotations

import copy
from typing import Any

import datasets
import numpy as np
from PIL import Image as PILImage

from mmdiff.benchmarks.fusion.distractors import with_distractors
from mmdiff.benchmarks.fusion.photos import NOTHING, ImageSets, own_photos, square
from mmdiff.benchmarks.fusion.settings import COLUMN, SetData, Settings, Task
from mmdiff.data import Rows
from mmdiff.data.files import undecoded
from mmdiff.data.sources import open_splits
from mmdiff.errors import InputError
from mmdiff.randomness import fold


def training_sets(settings: Settings) -> ImageSets:
    """The training rows: as many photos as the source's law says, or all of a row."""
    chosen = settings.distractors
    if chosen.train == "source":
        return _read(settings, settings.data.options, held_out=False)
    clean = own_photos(_read(settings, _with_law(settings.data), held_out=False))
    return with_distractors(clean, chosen.train, (chosen.share[0], chosen.share[1]), "train")


def single_photos(settings: Settings) -> ImageSets:
    """The training rows with one photo each, which is right."""
    return _few(own_photos(_read(settings, _with_law(settings.data, 1), held_out=False)), 1)


def held_out_sets(settings: Settings, views: int, share: float) -> ImageSets:
    """The first held-out rows with ``views`` photos each, or as many as a row has if it has fewer.

    A share of them, rounded at random, are distractors.
    """
    kind, rows = settings.distractors.test, settings.test.rows
    if kind == "source":
        return _few(_read(settings, _with_law(settings.data, views, share), held_out=True, limit=rows), views)
    clean = _few(own_photos(_read(settings, _with_law(settings.data, views), held_out=True, limit=rows)), views)
    return with_distractors(clean, kind, (share, share), f"test/{views}/{share}")


def front_views(settings: Settings) -> dict[str, PILImage.Image]:
    """{answer: the front view of a held-out object}, of every one among the first held-out rows."""
    data = settings.data
    ((_, task),) = settings.tasks.items()
    rows = open_rows(data)[1]
    _check_columns(rows, (data.front, *task.columns))
    chosen, views = undecoded(rows.select_columns(sorted({data.front, *task.columns}))), {}
    for index in range(min(settings.test.rows, len(chosen))):
        row = chosen[index]
        if None not in row.values():
            views.setdefault(_answer(row, task, rows.features), square(row[data.front], data.size))
    return views


def _law(options: dict[str, Any]) -> dict[str, Any] | None:
    """The part of a source's options that says how image sets are made; None: the rows have their own photos.

    The source shapes has it in a section of its own.
    """
    nested = options.get("image_sets")
    if isinstance(nested, dict):
        return nested
    return options if "views" in options else None


def _with_law(data: SetData, views: int | None = None, share: float = 0.0) -> dict[str, Any]:
    """The options with another law."""
    options = copy.deepcopy(data.options)
    law = _law(options)
    if law is not None:
        law |= {"distractors": share} | ({} if views is None else {"views": views})
    return options


def _few(sets: ImageSets, count: int) -> ImageSets:
    """At most ``count`` photos of each set, in random order; a law has given no more."""
    key = fold(0, 0, f"fusion/photos/{count}")

    def some(column: list[list[Any]]) -> list[list[Any]]:
        return [[members[place] for place in places] for members, places in zip(column, chosen, strict=True)]

    chosen = [
        range(len(photos))
        if len(photos) <= count
        else np.random.Generator(np.random.Philox(key=[key, index])).permutation(len(photos))[:count]
        for index, photos in enumerate(sets.photos)
    ]
    shown = {task: some(column) for task, column in sets.shown.items()}
    return sets._replace(photos=some(sets.photos), distractors=some(sets.distractors), shown=shown)


def open_rows(data: SetData, options: dict[str, Any] | None = None) -> tuple[Rows, Rows]:
    """The training rows and the held-out ones; with the experiment's own options, or with others."""
    chosen = data.options if options is None else options
    return open_splits(data.source, data.split, data.validation_split, options=chosen)


def _read(settings: Settings, options: dict[str, Any], held_out: bool, limit: int | None = None) -> ImageSets:
    data, rows = settings.data, open_rows(settings.data, options)[int(held_out)]
    columns = {name for task in settings.tasks.values() for name in (*task.columns, *task.asks)}
    _check_columns(rows, (data.photos, *sorted(columns)))
    marks = [name for name in (data.distractors, data.objects) if name in rows.column_names]
    chosen = undecoded(rows.select_columns(sorted({data.photos, *columns, *marks})))
    picked = [chosen[index] for index in range(len(chosen) if limit is None else min(limit, len(chosen)))]
    picked = [row for row in picked if row[data.photos] and None not in (row[name] for name in columns)]
    picked = [row for row in picked if not all(row.get(data.distractors) or [False])]
    if not picked:
        which = "held-out" if held_out else "training"
        raise InputError("fusion.tasks", sorted(columns), f"no {which} row has photos and an answer")
    photos = [[square(photo, data.size) for photo in row[data.photos]] for row in picked]
    distractors = [row.get(data.distractors) or [False] * len(row[data.photos]) for row in picked]
    answers = {name: [_answer(row, task, rows.features) for row in picked] for name, task in settings.tasks.items()}
    questions = {name: [_question(row, task, rows.features) for row in picked] for name, task in settings.tasks.items()}
    objects = [row.get(data.objects) or [None] * len(flags) for row, flags in zip(picked, distractors)]
    shown = {name: _shown(texts, objects, distractors) for name, texts in answers.items()}
    return ImageSets(photos, distractors, answers, shown, questions)


def _shown(answers: list[str], objects: list[list[Any]], distractors: list[list[bool]]) -> list[list[str]]:
    """The answer for each photo: a set's own for its photos, and for a distractor that of a set of the same object."""
    known = {
        thing: answer
        for answer, things, flags in zip(answers, objects, distractors)
        for thing, flag in zip(things, flags)
        if not flag and thing is not None
    }
    return [
        [known.get(thing, NOTHING) if flag else answer for thing, flag in zip(things, flags)]
        for answer, things, flags in zip(answers, objects, distractors)
    ]


def _check_columns(rows: Rows, wanted: tuple[str, ...]) -> None:
    for column in wanted:
        if column not in rows.column_names:
            raise InputError("fusion.data", column, f"the source has the columns {', '.join(rows.column_names)}")


def _answer(row: dict[str, Any], task: Task, features: Any) -> str:
    """The texts of the task's columns, with commas between several of them."""
    parts = [text for name in task.columns for text in _texts(row[name], features[name])]
    return " , ".join(parts).lower()


def _question(row: dict[str, Any], task: Task, features: Any) -> str:
    """The task's question, with the texts of the row's columns."""
    return COLUMN.sub(lambda found: " , ".join(_texts(row[found[1]], features[found[1]])), task.question)


def _texts(value: Any, feature: Any) -> list[str]:
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return [feature.int2str(value) if isinstance(feature, datasets.ClassLabel) else str(value)]
