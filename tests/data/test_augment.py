"""Changes of training rows: one for all modalities, a function of (seed, sample number) alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from refusals import refused
from torch import Tensor

from mmdiff.augmentation import Change
from mmdiff.build import Experiment, build
from mmdiff.config import parse_config
from mmdiff.data.order import Visit
from mmdiff.errors import InputError

SIDE, ROWS, GRID = 32, 6, (32, 32)
EVERYTHING = {
    "flip": 0.5,
    "vertical_flip": 0.5,
    "crop": [0.3, 0.9],
    "crop_ratio": [0.7, 1.4],
    "brightness": 0.3,
    "contrast": 0.3,
    "saturation": 0.5,
    "hue": 0.2,
}
VISITS = [Visit(k % ROWS, k) for k in range(2 * ROWS)]


def bytes_of(pixels: np.ndarray) -> dict[str, Any]:
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of flat 8×8 tiles that are black or white; everything else is computed from the image."""
    tiles = np.random.default_rng(0).integers(2, size=(ROWS, 4, 4)).repeat(8, 1).repeat(8, 2)  # (ROWS, 32, 32)
    noise = np.random.default_rng(1).integers(256, size=(ROWS, SIDE, SIDE, 4), dtype=np.uint8)
    noise[..., 3] = np.where(noise[..., 3] < 60, 0, 255)
    pictures = [np.where(t[..., None], 255, 0).astype(np.uint8).repeat(3, 2) for t in tiles]
    rows = {
        "image": [bytes_of(p) for p in pictures],
        "mask": [bytes_of(t.astype(np.uint8)) for t in tiles],
        "coarse": [bytes_of(t[::4, ::4].astype(np.uint8)) for t in tiles],  # 8×8
        "depth": [(t * 7.0 + 1.5).tolist() for t in tiles],
        "photo": [bytes_of(n[..., :3]) for n in noise],
        "holed": [bytes_of(n) for n in noise],
        "photos": [[bytes_of(n[..., :3]), bytes_of(n[..., :3])] for n in noise],
        "label": [k % 3 for k in range(ROWS)],
        "vector": [[k + 0.5, 1.0] for k in range(ROWS)],
    }
    image, numbers = datasets.Image(), datasets.List(datasets.List(datasets.Value("float32")))
    kinds = dict.fromkeys(("image", "mask", "coarse", "photo", "holed"), image)
    features = {**kinds, "depth": numbers, "photos": datasets.List(image), "label": datasets.Value("int64")}
    features["vector"] = datasets.List(datasets.Value("float32"))
    path = tmp_path_factory.mktemp("augment") / "rows.parquet"
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
    return path


@pytest.fixture
def opened(tiny: dict[str, Any], source: Path) -> Callable[..., Experiment]:
    def open_with(augment: dict[str, Any], modalities: dict[str, Any] | None = None, **data: Any) -> Experiment:
        tiny["data"] = {"source": str(source), "validation_split": "train", "augment": augment, **data}
        tiny["modalities"] = modalities or {
            "image": {"kind": "image"},
            "mask": {"kind": "mask"},
            "coarse": {"kind": "mask"},
            "depth": {"kind": "dense"},
            "label": {"kind": "label"},
            "vector": {"kind": "vector"},
        }
        return build(parse_config(tiny))

    return open_with


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_without_changes_and_outside_training_rows_stay_bit_identical(opened: Callable[..., Experiment]) -> None:
    plain = opened({}).train
    rows = [visit.row for visit in VISITS]
    assert plain.augment is None and same(plain.__getitems__(VISITS).values, plain.batch(rows).values)
    changed = opened(EVERYTHING)
    assert not same(changed.train.__getitems__(VISITS).values, plain.batch(rows).values)
    assert same(changed.train.batch(rows).values, plain.batch(rows).values)
    assert same(changed.validation.__getitems__(VISITS).values, plain.batch(rows).values)


@pytest.mark.parametrize("kind", ["flip", "vertical_flip"])
def test_flips_turn_every_map_pixel_by_pixel(opened: Callable[..., Experiment], kind: str) -> None:
    table = opened({kind: 1.0}).train
    before, after = table.batch([v.row for v in VISITS]).values, table.__getitems__(VISITS).values
    side = -1 if kind == "flip" else -2
    for name, value in before.items():
        assert torch.equal(after[name], value.flip(side) if name not in ("label", "vector") else value), name


def test_what_is_computed_from_the_image_is_so_after_crops(opened: Callable[..., Experiment]) -> None:
    """The class map, the coarse one and the depth follow the image, wherever no border of tiles is resampled."""
    values = opened({"flip": 0.5, "vertical_flip": 0.5, "crop": [0.3, 0.9]}).train.__getitems__(VISITS).values
    white = values["image"][:, 0]
    sure = white.abs() > 0.999  # bicubic weights mix the two at borders
    assert sure.float().mean() > 0.5
    assert torch.equal((white > 0)[sure], (values["mask"] == 1)[sure])
    assert torch.equal(values["depth"][:, 0], values["mask"] * 7.0 + 1.5)
    fine = values["coarse"].repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert (fine == values["mask"]).float().mean() > 0.9 and set(values["coarse"].unique().tolist()) == {0, 1}


def test_the_crop_of_a_map_is_the_map_of_the_crop(opened: Callable[..., Experiment]) -> None:
    """Half of each side, cut by hand; colours commute with what Pillow reads."""
    experiment = opened({"crop": 0.25}, cache_mib=0)
    (change,) = experiment.train.augment.changes(torch.tensor([5]), (8, 8))
    top, left, height, width = (round(SIDE * part) for part in change.box)
    assert (height, width) == (SIDE // 2, SIDE // 2)
    value = experiment.train.batch([0]).values
    part = {name: value[name][0][..., top : top + height, left : left + width] for name in ("image", "depth", "mask")}
    after = {name: values[0] for name, values in experiment.train.__getitems__([Visit(0, 5)]).values.items()}
    for name in ("depth", "mask"):
        assert torch.equal(after[name], part[name].repeat_interleave(2, -2).repeat_interleave(2, -1)), name
    picture = PILImage.fromarray(((part["image"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    resized = np.asarray(picture.resize((SIDE, SIDE), PILImage.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1
    assert (after["image"].permute(1, 2, 0) - torch.from_numpy(resized)).abs().max() < 0.02


def test_colours_touch_images_alone(opened: Callable[..., Experiment]) -> None:
    table = opened({name: EVERYTHING[name] for name in ("brightness", "contrast", "saturation", "hue")}).train
    before, after = table.batch([v.row for v in VISITS]).values, table.__getitems__(VISITS).values
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["image"]
    assert after["image"].abs().max() <= 1


def test_holes_are_made_after_the_changes(opened: Callable[..., Experiment]) -> None:
    modalities = {"image": {"kind": "image"}, "masked_image": {"kind": "masked_image"}}
    table = opened(EVERYTHING, modalities, masking={"masked_image": {}}).train
    plain = opened({}, modalities, masking={"masked_image": {}}).train.__getitems__(VISITS).values
    values = table.__getitems__(VISITS).values
    pixels, known = values["masked_image"].split([3, 1], dim=1)
    assert torch.equal(pixels, values["image"] * known) and torch.equal(known, plain["masked_image"][:, -1:])


def test_a_hole_of_a_column_leaks_nothing_and_its_known_pixels_are_the_images(
    opened: Callable[..., Experiment],
) -> None:
    settings = {key: value for key, value in EVERYTHING.items() if key != "contrast"}
    modalities = {"image": {"kind": "image"}, "masked_image": {"kind": "masked_image"}}
    columns = {"image": "photo", "masked_image": "holed"}
    table = opened(settings, modalities, columns=columns).train
    values = table.__getitems__(VISITS).values
    pixels, known = values["masked_image"].split([3, 1], dim=1)
    assert torch.allclose(pixels, values["image"] * known, atol=2e-5) and 0.005 < known.mean() < 0.9
    with refused("data.augment.contrast"):
        opened(EVERYTHING, modalities, columns=columns)


def test_the_photos_of_a_set_change_alike(opened: Callable[..., Experiment]) -> None:
    modalities = {"image": {"kind": "image"}, "photos": {"kind": "image_set", "encoder": {"kind": "convolutions"}}}
    values = opened(EVERYTHING, modalities, columns={"image": "photo"}).train.__getitems__(VISITS).values
    first, second = values["photos"].unbind(1)
    assert torch.equal(first, second) and torch.equal(first[:, :-1], values["image"])


def test_changes_are_functions_of_seed_and_sample_number(opened: Callable[..., Experiment]) -> None:
    """Not of the batch, the row, the cache or the worker; another seed or sample is another change."""
    augment = opened(EVERYTHING).train.augment
    together = augment.changes(torch.arange(40), GRID)
    assert together == [augment.changes(torch.tensor([k]), GRID)[0] for k in range(40)] and len(set(together)) == 40
    assert all(0.28 < h * w < 0.95 for _, _, h, w in (change.box for change in together))
    assert {change.flip for change in together} == {change.vertical_flip for change in together} == {True, False}
    augment.seed = 1
    assert not set(together) & set(augment.changes(torch.arange(40), GRID))


def batches_of(table: Any, workers: int) -> Iterator[dict[str, Tensor]]:
    batches = [VISITS[start : start + 4] for start in range(0, len(VISITS), 4)]
    for batch in torch.utils.data.DataLoader(table, batch_sampler=batches, num_workers=workers, collate_fn=lambda b: b):
        yield batch.values


def test_workers_threads_and_the_cache_change_no_bit(opened: Callable[..., Experiment]) -> None:
    cached, read = opened(EVERYTHING).train, opened(EVERYTHING, cache_mib=0).train
    expected = list(batches_of(cached, 0))
    torch.set_num_threads(2)
    for table, workers in ((cached, 0), (read, 0), (read, 2)):
        assert all(same(one, two) for one, two in zip(expected, batches_of(table, workers), strict=True))


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("data.augment.flip", {"flip": 1.5}),
        ("data.augment.crop", {"crop": 0}),
        ("data.augment.crop", {"crop": [0.9, 0.5]}),
        ("data.augment.crop_ratio", {"crop_ratio": 0}),
        ("data.augment.brightness", {"brightness": -0.5}),
        ("data.augment.hue", {"hue": 0.7}),
        ("data.augment.unchanged", {"flip": 0.5, "unchanged": ["depht"]}),
        ("data.augment.unchanged", {"flip": 0.5, "unchanged": ["image"]}),
        ("data.augment.rotate", {"rotate": 3}),
    ],
)
def test_settings_without_sense_are_refused(opened: Callable[..., Experiment], key: str, settings: Any) -> None:
    with refused(key):
        opened(settings)


def test_colours_that_no_image_has_and_grids_too_coarse_for_crops_are_refused(
    opened: Callable[..., Experiment],
) -> None:
    with refused("data.augment.hue"):
        opened({"hue": 0.1}, {"image": {"kind": "image", "channels": 1}})
    coarse = {"image": {"kind": "image"}, "coarse": {"kind": "mask", "size": 4, "resize": True}}
    with refused("data.augment.crop"):
        opened({"crop": 0.5}, coarse)
    opened({"crop": 0.5, "unchanged": ["coarse"]}, coarse)


def test_a_modality_of_ones_own_says_how_it_follows(
    opened: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left and right change places; a map that does not say how it follows is refused."""
    (tmp_path / "own_followers.py").write_text(
        "from mmdiff.modalities import Dense, Label, Value\n"
        "class Side(Label):\n"
        "    def follow(self, value, change):\n"
        "        return 2 - value if change.flip else value\n"
        "class Silent(Dense):\n"
        "    follow = Value.follow\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    image = {"image": {"kind": "image"}}
    table = opened({"flip": 1.0}, {**image, "label": {"kind": "own_followers:Side"}}).train
    assert table.__getitems__([Visit(0, 0), Visit(1, 1), Visit(2, 2)]).values["label"].tolist() == [2, 1, 0]
    with pytest.raises(InputError, match="follow"):
        opened({"flip": 1.0}, {**image, "depth": {"kind": "own_followers:Silent"}})
    opened({"flip": 1.0, "unchanged": ["depth"]}, {**image, "depth": {"kind": "own_followers:Silent"}})


def test_a_change_of_nothing_changes_nothing(opened: Callable[..., Experiment]) -> None:
    experiment = opened({})
    values = experiment.train.batch([0]).values
    for name, modality in experiment.model.modalities.items():
        assert torch.equal(modality.follow(values[name][0], Change()), values[name][0]), name
