"""Photos that do not belong to a set take the places of photos that do: which photos, and how many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import TypeVar

import numpy as np
from PIL import Image as PILImage

from mmdiff.benchmarks.fusion.photos import NOTHING, ImageSets
from mmdiff.data.image_sets import drawn_counts
from mmdiff.randomness import fold

T = TypeVar("T")
Group = list[int]  # the sets of one object
Distractor = tuple[PILImage.Image, int | None]  # a photo, and the set whose object it shows
Draw = Callable[[np.random.Generator, ImageSets, Sequence[Group]], Iterator[Distractor]]


def with_distractors(sets: ImageSets, kind: str, shares: tuple[float, float], stream: str) -> ImageSets:
    """Photos of every set give way to distractors; one photo of its own is always left.

    Objects are told apart by what is asked about them, or where all are asked the same by their answers to all tasks.
    Where there is only one object, nothing changes.

    Args:
        sets: without distractors.
        kind: a key of `DISTRACTORS`.
        shares: least and largest share of distractors, drawn uniformly and rounded at random.
        stream: name of the random numbers; they depend on this name and the number of the set alone.
    """
    asked = [texts for texts in sets.questions.values() if len(set(texts)) > 1]
    objects = list(zip(*(asked or sets.answers.values()), strict=True))
    key = fold(0, 0, f"fusion/distractors/{stream}")
    groups: dict[tuple[str, ...], Group] = {}
    for index, thing in enumerate(objects):
        groups.setdefault(thing, []).append(index)
    mixed = sets._replace(photos=[], distractors=[], shown={task: [] for task in sets.answers})
    for index, photos in enumerate(sets.photos):
        rng = np.random.Generator(np.random.Philox(key=[key, index]))
        others = [group for thing, group in groups.items() if thing != objects[index]]
        order = rng.permutation(len(photos))
        count = drawn_counts((len(photos), len(photos)), shares, np.array([0.0, *rng.random(2)]))[1] if others else 0
        foreign = list(islice(DISTRACTORS[kind](rng, sets, others), count))
        own: list[Distractor] = [(photos[place], index) for place in order[len(foreign) :]]
        members = [*own, *foreign]
        order = rng.permutation(len(members))
        mixed.photos.append([members[place][0] for place in order])
        mixed.distractors.append([bool(place >= len(own)) for place in order])
        for task, texts in sets.answers.items():
            shows = [members[place][1] for place in order]
            mixed.shown[task].append([NOTHING if donor is None else texts[donor] for donor in shows])
    return mixed


def _none(rng: np.random.Generator, sets: ImageSets, others: Sequence[Group]) -> Iterator[Distractor]:
    """Every photo shows the object."""
    return iter(())


def _random(rng: np.random.Generator, sets: ImageSets, others: Sequence[Group]) -> Iterator[Distractor]:
    """Pixels of a photo of another object in random order: the photo itself tells."""
    for photo, _ in _foreign(rng, sets, others):
        pixels = np.asarray(photo).reshape(-1, 3)
        yield PILImage.fromarray(rng.permutation(pixels).reshape(*photo.size[::-1], 3)), None


def _foreign(rng: np.random.Generator, sets: ImageSets, others: Sequence[Group]) -> Iterator[Distractor]:
    """Each photo shows another object of its own choice: the set tells."""
    while True:
        yield _photo(rng, sets, _one(rng, others))


def _coherent(rng: np.random.Generator, sets: ImageSets, others: Sequence[Group]) -> Iterator[Distractor]:
    """All show one and the same other object: the larger number tells, if it does."""
    donor = _one(rng, _one(rng, others))
    photos = sets.photos[donor]
    return ((photos[place], donor) for place in cycle(rng.permutation(len(photos))))


def _photo(rng: np.random.Generator, sets: ImageSets, group: Group) -> Distractor:
    donor = _one(rng, group)
    return _one(rng, sets.photos[donor]), donor


def _one(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


DISTRACTORS: dict[str, Draw] = {"none": _none, "random": _random, "foreign": _foreign, "coherent": _coherent}
