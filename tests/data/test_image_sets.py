"""Image sets of any data set: what is held out stays out, every draw is a function of the seed, nothing repeats."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image as PILImage
from refusals import refused

from mmdiff.build import build
from mmdiff.config import parse_config
from mmdiff.data.sources import open_splits

OBJECTS, VIEWS = 5, 9
COIL = Path(__file__).parents[3] / "shared" / "data" / "coil100"


def png(thing: int, view: int, size: int = 8) -> dict[str, Any]:
    """An image that says of which object it is, and which view."""
    file = io.BytesIO()
    PILImage.new("RGB", (size, size), (40 * thing, 20 * view, 0)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Objects in turn, as COIL-100 is stored; one row belongs to none, and one object has a single view."""
    rows = [(png(k, v), k, f"object {k}") for v in range(VIEWS) for k in range(OBJECTS)]
    rows += [(png(6, 0), None, "no object"), (png(6, 1), 6, "alone")]
    columns = dict(zip(("image", "thing", "name"), map(list, zip(*rows)), strict=True))
    path = tmp_path_factory.mktemp("image_sets") / "views.parquet"
    types = {"image": datasets.Image(), "thing": datasets.Value("int64"), "name": datasets.Value("string")}
    datasets.Dataset.from_dict(columns, features=datasets.Features(types)).to_parquet(path)
    return str(path)


def image_sets(source: str, **options: Any) -> tuple[Any, Any]:
    return open_splits("image_sets", options={"source": source, "object": "thing", "rows": 60, "every": 4, **options})


def shown(image: Any) -> tuple[int, int]:
    """(object, view) of an image."""
    stored = isinstance(image, dict)  # photos stay as they are stored until a modality reads them
    red, green, _ = (datasets.Image().decode_example(image) if stored else image).getpixel((0, 0))
    return red // 40, green // 20


def views(rows: Any) -> set[tuple[int, int]]:
    return {shown(photo) for row in rows for photo in row["photos"]}


def test_a_row_is_the_front_view_with_other_views_of_the_object(source: str) -> None:
    train, validation = image_sets(source, views=[1, 4], validation_rows=30)
    assert (len(train), len(validation)) == (60, 30)
    assert train.column_names == ["image", "thing", "name", "photos", "distractors", "objects"] == list(train.features)
    sizes = Counter()
    for row in train:
        found = [shown(photo) for photo in row["photos"]]
        assert shown(row["image"]) == (row["thing"], 0) and row["name"] == f"object {row['thing']}"
        assert {thing for thing, _ in found} == {row["thing"]} and (row["thing"], 0) not in found
        assert len(set(found)) == len(found) and row["distractors"] == [False] * len(found)
        sizes[len(found)] += 1
    assert set(sizes) == {1, 2, 3, 4} and min(sizes.values()) > 5
    assert Counter(row["thing"] for row in train) == dict.fromkeys(range(OBJECTS), 12)


def test_views_are_held_out(source: str) -> None:
    train, validation = image_sets(source, views=[1, 4], rows=300)
    expected = {(thing, view) for thing in range(OBJECTS) for view in range(1, VIEWS)}
    assert views(train).isdisjoint(views(validation)) and views(train) | views(validation) == expected
    assert {view for _, view in views(validation)} == {4, 8}  # every fourth after the front
    assert max(len(row["photos"]) for row in validation) == 2  # no more are held out


def test_objects_are_held_out(source: str) -> None:
    train, validation = image_sets(source, hold_out="objects", views=3)
    assert {row["thing"] for row in train} == {0, 1, 2, 4} and {row["thing"] for row in validation} == {3}
    assert {thing for thing, _ in views(validation)} == {3} and len(views(validation)) == VIEWS - 1
    assert all(len(row["photos"]) == 3 for row in train)


def test_distractors_are_views_of_others_and_are_marked(source: str) -> None:
    train, _ = image_sets(source, views=4, distractors=0.5)
    first = 0
    for row in train:
        assert row["objects"] == [shown(photo)[0] for photo in row["photos"]]
        foreign = [thing != row["thing"] for thing in row["objects"]]
        assert row["distractors"] == foreign and sum(foreign) == 2
        first += foreign[0]
    assert first / len(train) == pytest.approx(0.5, abs=0.25)
    one, _ = image_sets(source, views=1, distractors=0.9)
    assert not any(any(row["distractors"]) for row in one)


def test_rows_are_a_function_of_the_seed_and_the_index(source: str) -> None:
    train, validation = image_sets(source, rows=20, distractors=[0, 0.5])
    again = pickle.loads(pickle.dumps(image_sets(source, rows=40, distractors=[0, 0.5])[0]))
    for index in (0, 3, 19):
        assert [shown(p) for p in train[index]["photos"]] == [shown(p) for p in again[index]["photos"]]
        assert train.select([index]).select_columns("distractors")[0] == {"distractors": train[index]["distractors"]}
    other, _ = image_sets(source, rows=20, distractors=[0, 0.5], seed=1)
    assert [len(row["photos"]) for row in other] != [len(row["photos"]) for row in train]


MISFITS = [
    ({"object": "item"}, "object", "item"),
    ({"image": "photo"}, "image", "photo"),
    ({"split": "test"}, "split", "test"),
    ({"views": [0, 2]}, "views", [0, 2]),
    ({"views": 1.5}, "views", 1.5),
    ({"distractors": 1}, "distractors", 1),
    ({"hold_out": "rows"}, "hold_out", "rows"),
    ({"every": 1}, "every", 1),
    ({"every": 40}, "object", "thing"),
    ({"photos": 3}, "data.options.photos", 3),
]


def test_what_does_not_fit_is_refused(source: str) -> None:
    for options, key, value in MISFITS:
        with refused(key, value):
            image_sets(source, **options)


def experiment(tiny: dict[str, Any], source: str, **image: Any) -> Any:
    tiny["data"] = {
        "source": "image_sets",
        "options": {"source": source, "object": "object" if source == str(COIL) else "thing", "views": [1, 3]},
        "columns": {"image_set": "photos", "label": "object" if source == str(COIL) else "thing"},
        "cache_mib": 0,
    }
    tiny["modalities"] = {
        "image": {"kind": "image", **image},
        "label": {"kind": "label"},
        "image_set": {"kind": "image_set", "dim": 8, **image},
    }
    return build(parse_config(tiny))


def test_a_model_reads_them(tiny: dict[str, Any], source: str) -> None:
    built = experiment(tiny, source)
    batch = built.train.batch(range(6))
    assert batch.values["image_set"].shape == (6, 3, 4, 8, 8)
    assert batch.values["label"].tolist() == [0, 1, 2, 3, 4, 0]
    assert built.config.modalities["image_set"].settings()["max_images"] == 3


@pytest.mark.data
def test_coil_is_bags_of_72_views_of_9_objects(tiny: dict[str, Any]) -> None:
    built = experiment(tiny, str(COIL), size=16, resize=True)
    assert built.config.modalities["label"].settings()["num_classes"] == 9
    assert built.train.batch(range(9)).values["label"].tolist() == list(range(9))
    assert built.train.batch(range(4)).values["image_set"].shape == (4, 3, 4, 16, 16)
    train, validation = open_splits("image_sets", options={"source": str(COIL), "hold_out": "objects", "every": 3})
    assert {row["object"] for row in train.select_columns("object")} == {0, 1, 3, 4, 6, 7}
    assert {row["object"] for row in validation.select_columns("object")} == {2, 5, 8}
