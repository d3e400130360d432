"""ImageSets of shapes: photos of one object by a stated law, a function of (seed, split, index)."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused

from mmdiff.data.shapes.image_sets import load
from mmdiff.data.shapes.readers import read_kind, read_label
from mmdiff.data.shapes.render import COLORS, OCCLUDER, SHAPES
from mmdiff.data.sources import open_splits

COUNT = 300


def rows(count: int = COUNT, seed: int = 0, **image_sets: Any) -> Any:
    return load(rows=count, validation_rows=count, seed=seed, image_sets=image_sets)["train"]


def column(name: str, count: int = COUNT, **image_sets: Any) -> list[Any]:
    return [row[name] for row in rows(count, **image_sets).select_columns([name])]


def as_images(pictures: list[Any]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(one) for one in pictures])).permute(0, 3, 1, 2) / 127.5 - 1


def test_a_row_is_a_function_of_seed_split_and_index() -> None:
    first, again = rows(distractors=[0, 0.5]), pickle.loads(pickle.dumps(rows(40, distractors=[0, 0.5])))
    for index in (0, 7, 39):
        one, other = first[index], again.select([index])[0]
        assert [photo.tobytes() for photo in one["photos"]] == [photo.tobytes() for photo in other["photos"]]
        assert one["distractors"] == other["distractors"] and one["kind"] == other["kind"]
    assert first[3]["photos"][0].tobytes() != rows(4, seed=1)[3]["photos"][0].tobytes()
    assert [photo.tobytes() for photo in first[3]["photos"]] != [
        photo.tobytes() for photo in load(image_sets={"distractors": [0, 0.5]})["validation"][3]["photos"]
    ]


def test_a_bag_changes_nothing_of_the_other_columns() -> None:
    plain, bagged = load(rows=3)["train"], rows(3)
    for one, other in zip(plain, bagged):
        assert one["image"].tobytes() == other["image"].tobytes() and one["embedding"] == other["embedding"]
    assert set(bagged.column_names) - set(plain.column_names) == {
        *("photos", "distractors", "objects", "front", "kind", "description")
    }
    assert set(bagged.features) == set(bagged.column_names)


def test_sizes_and_distractors_follow_their_laws() -> None:
    flags = column("distractors", views=[1, 4], distractors=0.5)
    sizes = np.array([len(one) for one in flags])
    assert np.allclose(np.bincount(sizes, minlength=5)[1:] / COUNT, 0.25, atol=4 * np.sqrt(0.25 * 0.75 / COUNT))
    assert all(not all(one) for one in flags)
    four = np.array([sum(one) for one in flags if len(one) == 4])
    assert (four == 2).all()  # half of four
    assert np.mean([one[0] for one in flags if len(one) == 4]) == pytest.approx(0.5, abs=0.25)  # any place
    assert sum(map(sum, column("distractors", 50))) == 0


def test_whole_photos_show_the_kind_and_distractors_another() -> None:
    """The rules read what is in every photo; colours of strangers are darker but the same."""
    image_sets = {"visible": 2.0, "distractors": 0.5, "strangers": False}
    own, kinds = rows(60, **image_sets), column("kind", 60, **image_sets)
    for row, kind in zip(own, kinds):
        read = read_kind(as_images(row["photos"]))
        assert read.tolist() == row["objects"]
        assert [one != kind for one in row["objects"]] == row["distractors"]
    fronts = as_images(column("front", 60))
    assert torch.equal(read_kind(fronts), torch.tensor(kinds))
    assert torch.equal(read_label(fronts), torch.tensor(kinds) // len(COLORS))
    described = rows(1)[0]
    assert described["description"] == f"a {COLORS[described['color']]} {SHAPES[described['label']]}"
    assert rows().features["kind"].int2str(described["kind"]) == described["description"].removeprefix("a ")


def test_a_photo_shows_the_part_that_was_asked_for() -> None:
    """The share of the bounding square that is not grey is (visible / 2)²."""
    for visible in (0.5, 1.0):
        hidden, square = 0, 0
        for row in rows(100, visible=visible, views=1):
            pixels = np.asarray(row["photos"][0]).astype(int)
            grey = (pixels == OCCLUDER).all(axis=2)
            down, across = np.where(grey.any(axis=1))[0], np.where(grey.any(axis=0))[0]
            hidden += grey.sum()
            square += (down[-1] - down[0] + 1) * (across[-1] - across[0] + 1)
        assert 1 - hidden / square == pytest.approx((visible / 2) ** 2, rel=0.35)  # whole pixels


def test_strangers_are_striped() -> None:
    for row in rows(20, visible=2.0, distractors=0.5, views=4):
        for photo, stranger in zip(row["photos"], row["distractors"]):
            pixels = np.asarray(photo).astype(int).max(axis=2)
            bright = pixels > 150
            assert (len(np.unique(np.diff(np.where(bright.any(axis=1))[0]))) > 0) and bright.any()
            inside = bright[1:-1, 1:-1] & ~bright[1:-1, 2:]  # where a bright pixel has a dark neighbour
            assert (inside.sum() > 0.25 * bright.sum()) == stranger


IMPOSSIBLE = [
    ({"views": 0}, "image_sets.views"),
    ({"views": [3, 2]}, "image_sets.views"),
    ({"views": [1, 2, 3]}, "image_sets.views"),
    ({"visible": 0}, "image_sets.visible"),
    ({"visible": 2.5}, "image_sets.visible"),
    ({"distractors": 1.0}, "image_sets.distractors"),
    ({"distractors": [0.5, 0.1]}, "image_sets.distractors"),
]


def test_impossible_bags_are_refused() -> None:
    for image_sets, key in IMPOSSIBLE:
        with refused(key):
            load(image_sets=image_sets)


def test_bags_are_an_option_of_the_source() -> None:
    train, validation = open_splits("shapes", options={"rows": 5, "validation_rows": 2, "image_sets": {"views": 2}})
    assert len(train) == 5 and len(validation) == 2 and len(train[0]["photos"]) == 2
    with refused("data.options", {"image_sets": {"photos": 2}}):
        open_splits("shapes", options={"image_sets": {"photos": 2}})
