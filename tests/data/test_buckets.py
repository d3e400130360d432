"""Buckets: one shape per global batch, every row equally often, and all of it a function of (seed, step)."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image as PILImage
from refusals import refused
from safetensors.torch import load_file

from mmdiff.build import build
from mmdiff.config import parse_config
from mmdiff.data.buckets import BucketOrder, generated_sizes, nearest
from mmdiff.data.order import MicroBatches, Order
from mmdiff.training import train

COUNTS, BATCH = (53, 34, 12, 3), 8  # rows per bucket; the last needs three epochs for a batch
OF_ROWS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))
ROWS = len(OF_ROWS)


def order(seed: int = 5, shards: Any = ROWS) -> BucketOrder:
    return BucketOrder(Order(shards, seed), OF_ROWS, BATCH)


@pytest.mark.parametrize("shards", [ROWS, [[30, 20], [40], [12]]], ids=["table", "streamed"])
def test_a_batch_is_of_one_bucket_and_every_row_of_a_bucket_comes_equally_often(shards: Any) -> None:
    whole = order(shards=shards)
    rows = [whole.row(index) for index in range(BATCH * 150)]
    for step in range(150):
        assert len(set(OF_ROWS[rows[step * BATCH : (step + 1) * BATCH]])) == 1
    for bucket, count in enumerate(COUNTS):
        seen = [row for row in rows if OF_ROWS[row] == bucket]
        for start in range(0, len(seen) - count + 1, count):
            assert len(set(seen[start : start + count])) == count  # one epoch of the bucket
    epochs = BATCH * 150 / ROWS
    times = Counter(rows)
    assert all(abs(times[row] - epochs) <= BATCH for row in range(ROWS)) and len(times) == ROWS


def test_it_is_a_function_of_seed_and_step() -> None:
    """Any step can be the first, whatever was asked before; another seed is another order."""
    whole = order()
    steps = [[whole.row(step * BATCH + place) for place in range(BATCH)] for step in range(120)]
    for step in np.random.default_rng(1).permutation(120)[:40]:
        fresh = order()
        for asked in (whole, fresh):
            assert [asked.row(int(step) * BATCH + place) for place in range(BATCH)] == steps[step]
    other = order(seed=6)
    assert [[other.row(step * BATCH + place) for place in range(BATCH)] for step in range(9)] != steps[:9]


@pytest.mark.parametrize(("parts", "world"), [(1, 2), (2, 1), (2, 2)])
def test_processes_and_parts_share_the_shape_of_a_global_batch(parts: int, world: int) -> None:
    whole = order()
    for step in range(40):
        shares = [MicroBatches(order(), step, step + 1, BATCH, parts, rank, world) for rank in range(world)]
        visits = sorted((visit.sample, visit.row) for share in shares for batch in share for visit in batch)
        assert visits == [(step * BATCH + place, whole.row(step * BATCH + place)) for place in range(BATCH)]


def test_sizes_keep_the_area_and_rows_go_to_the_nearest_aspect() -> None:
    sizes = generated_sizes((64, 64), (8, 8), 2.0)
    assert sizes == [(48, 80), (56, 72), (64, 64), (72, 56), (80, 48)]
    assert all(h % 8 == w % 8 == 0 and 0.9 * 64**2 <= h * w <= 64**2 for h, w in sizes)
    assert [sizes[nearest(sizes, size)] for size in [(100, 900), (300, 310), (35, 28), (9, 3)]] == [
        (48, 80),
        (64, 64),
        (72, 56),
        (80, 48),
    ]
    squares = [(32, 32), (64, 64), (128, 128)]
    assert [squares[nearest(squares, (side, side))][0] for side in (16, 32, 100, 500)] == [32, 32, 64, 128]


# ------------------------------------------------------------------------------------------------- images of shapes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey images of three shapes, larger than their buckets; the mask is where the image is white."""
    folder, generator = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    images, masks = [], []
    for number in range(40):
        height, width, side = [(16, 16, 4), (12, 20, 4), (40, 24, 8)][number % 3]
        tiles = generator.integers(2, size=(height // side, width // side), dtype=np.uint8)
        ids = tiles.repeat(side, 0).repeat(side, 1)
        images.append(PILImage.fromarray(ids * 255))
        masks.append(PILImage.fromarray(ids))
    rows = {"image": images, "mask": masks, "label": [number % 3 for number in range(40)]}
    features = {"image": datasets.Image(), "mask": datasets.Image(), "label": datasets.Value("int64")}
    path = folder / "rows.parquet"
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
    return path


SIZES = [[16, 16], [12, 20], [20, 12]]


@pytest.fixture
def tree(tiny: dict[str, Any], source: Path) -> dict[str, Any]:
    tiny["data"] = {"source": str(source), "holdout": 5, "buckets": {"sizes": SIZES}, "augment": {"flip": 0.5}}
    tiny["data"]["masking"] = {"masked_image": {}}
    tiny["modalities"] = {
        "image": {"kind": "image", "size": 16, "resize": True},
        "mask": {"kind": "mask", "size": 16, "resize": True},
        "masked_image": {"kind": "masked_image"},
        "label": {"kind": "label"},
    }
    return tiny


def test_rows_are_read_at_the_size_of_their_bucket(tree: dict[str, Any]) -> None:
    """All modalities alike, also after a flip; evaluation reads the model's own size."""
    experiment = build(parse_config(tree))
    table, shapes = experiment.train, set()
    batches = MicroBatches(table.order(0, 1, 4), 0, 30, 4, 1, 0, 1)
    for visits in batches:
        values = table.__getitems__(visits).values
        shape = tuple(values["image"].shape[-2:])
        shapes.add(shape)
        assert values["mask"].shape[-2:] == values["masked_image"].shape[-2:] == shape
        labels = {(16, 16): 0, (12, 20): 1, (20, 12): 2}
        assert set(values["label"].tolist()) == {labels[shape]}
        sure = values["image"][:, 0].abs() > 0.99
        assert sure.float().mean() > 0.3 and torch.equal((values["image"][:, 0] > 0)[sure], (values["mask"] == 1)[sure])
    assert shapes == {tuple(size) for size in SIZES}
    for whole in (table.all(8), experiment.validation.all(8)):
        assert whole.values["image"].shape[-2:] == (16, 16)


def test_training_parts_workers_and_a_resumed_run_agree(tree: dict[str, Any], tmp_path: Path) -> None:
    """The same weights bit by bit, but for parts, which add up in another order."""

    def weights(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        settings = {**tree, "output": str(tmp_path / name)}
        settings["train"] = {**tree["train"], "checkpoint_every": 3, **changes.pop("train", {})}
        settings["data"] = {**tree["data"], **changes}
        folder = train(parse_config(settings), progress=False)
        return load_file(folder / "pipeline" / "model" / "diffusion_pytorch_model.safetensors")

    whole = weights("whole")
    workers = weights("workers", workers=2)
    weights("stopped", train={"steps": 6})
    resumed = weights("resumed", train={"steps": 6, "resume": str(tmp_path / "stopped" / "checkpoints" / "step-3")})
    parts = weights("parts", train={"accumulate": 2})
    for name, tensor in whole.items():
        assert torch.equal(tensor, workers[name]) and torch.equal(tensor, resumed[name]), name
        assert torch.allclose(tensor, parts[name], atol=1e-5), name


REFUSED = [
    ("data.buckets.sizes", {"sizes": [[16, 16], [15, 17]]}),
    ("data.buckets.sizes", {"sizes": [[16, 16], [16, 16]]}),
    ("data.buckets.sizes.0.1", {"sizes": [[16, 0]]}),
    ("data.buckets.sizes", {"sizes": []}),
    ("data.buckets.ratio", {"ratio": 0.5}),
    ("data.buckets.ratio", {"ratio": 1.1}),
    ("data.buckets.ratio", {"sizes": [[16, 16]], "ratio": 3}),
    ("data.buckets.multiple", {"multiple": 7}),
    ("data.buckets.aspect", {"aspect": 2}),
]


@pytest.mark.parametrize(("key", "buckets"), REFUSED)
def test_impossible_sizes_are_refused(tree: dict[str, Any], key: str, buckets: dict[str, Any]) -> None:
    tree["data"]["buckets"] = buckets
    with refused(key):
        build(parse_config(tree))


def test_a_modality_of_one_size_is_refused(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one_size.py").write_text(
        "from torch import nn\n"
        "from mmdiff.modalities import Mask\n"
        "class Fixed(Mask):\n"
        "    def __init__(self, shape, **settings):\n"
        "        super().__init__(shape, **settings)\n"
        "        self.head = nn.Flatten()\n"
        "    def decode(self, features, pooled):\n"
        "        return self.head(features)[:, :512].reshape(-1, 2, 16, 16)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tree["modalities"]["mask"]["kind"] = "one_size:Fixed"
    with refused("data.buckets", "20x12", "mask (Fixed)"):
        build(parse_config(tree))


def test_streamed_rows_have_the_same_buckets_and_a_stop_changes_no_bit(
    tree: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    """Row groups of four, workers and accumulation; the second start finds the buckets in the cache."""
    streamed = tmp_path / "rows.parquet"
    pq.write_table(pq.read_table(source), streamed, row_group_size=4)
    tree["data"] |= {"workers": 2, "streams": 4, "missing": {}}
    tree["modalities"]["label"]["num_classes"] = tree["modalities"]["mask"]["num_classes"] = 3
    tree["train"] |= {"accumulate": 2, "batch_size": 8, "steps": 9, "checkpoint_every": 4, "resume": "auto"}
    whole = build(parse_config(tree)).train.buckets
    tree["data"] |= {"source": str(streamed), "streaming": True}
    assert [build(parse_config(tree)).train.buckets.of_rows.tolist() for _ in range(2)] == [whole.of_rows.tolist()] * 2
    runs = [train(parse_config(tree | {"output": str(tmp_path / name)}), progress=False) for name in ("a", "b")]
    for lost in ("checkpoints/step-9", "pipeline"):
        shutil.rmtree(runs[1] / lost)
    tree["data"]["workers"] = 0
    train(parse_config(tree | {"output": str(runs[1])}), progress=False)
    one, other = (load_file(run / "checkpoints" / "step-9" / "weights.safetensors") for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)
