"""Any Hugging Face data set becomes batches; what cannot be used is one line that names the row."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from torch.utils.data import DataLoader

from mmdiff.build import build, build_stand_in
from mmdiff.config import Config, load_config
from mmdiff.data import Batch, Table, open_splits
from mmdiff.data.masking import known_masks
from mmdiff.data.order import Visit
from mmdiff.errors import InputError

Configure = Callable[..., Config]
ROOT = Path(__file__).parents[2]
COUNT = 12


def rows(**changes: Any) -> datasets.Dataset:
    """Twelve random grey 8×8 images; labels 0, 1, 2, … mod 3, the third and the seventh unknown."""
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8), dtype=np.uint8)
    columns: dict[str, list] = {
        "image": [Image.fromarray(p) for p in pixels],
        "label": [None if i in (2, 6) else i % 3 for i in range(COUNT)],
    }
    for key, value in changes.items():
        name, index = key.split("_")
        columns[name][int(index)] = value
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., str]:
    """`source(image_3=…)`: a parquet file with changed rows."""

    def write(**changes: Any) -> str:
        rows(**changes).to_parquet(tmp_path / "rows.parquet")
        return f"data.source={tmp_path / 'rows.parquet'}"

    return write


def equal(one: Batch, other: Batch) -> bool:
    assert set(one.values) == set(one.present) == set(other.values) == set(other.present)
    pairs = [(one.values[name], other.values[name]) for name in one.values]
    pairs += [(one.present[name], other.present[name]) for name in one.present]
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_a_parquet_file_becomes_values_with_presence(configure: Configure, source: Callable[..., str]) -> None:
    table = build(configure(source(), "data.holdout=4")).train
    batch = table.all()
    kept = [i for i in range(COUNT) if i % 4 != 3]
    pixels = np.stack([np.asarray(image) for image in rows()["image"]])[kept]
    assert torch.equal(batch.values["image"], torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1.0)[:, None])
    assert batch.present["image"].all()
    assert batch.present["label"].tolist() == [i not in (2, 6) for i in kept]
    assert batch.values["label"].tolist() == [0 if i in (2, 6) else i % 3 for i in kept]
    assert batch.values["label"].dtype == torch.int64


def test_holding_out_takes_every_kth_row(source: Callable[..., str]) -> None:
    train, held_out = open_splits(source().partition("=")[2], holdout=5)
    labels = rows()["label"]
    assert list(held_out["label"]) == [labels[4], labels[9]]
    assert list(train["label"]) == [label for i, label in enumerate(labels) if i not in (4, 9)]


def test_a_folder_has_the_splits_of_its_files(tmp_path: Path) -> None:
    rows().to_parquet(tmp_path / "train.parquet")
    rows().select(range(5)).to_parquet(tmp_path / "validation.parquet")
    train, held_out = open_splits(str(tmp_path))
    assert (len(train), len(held_out)) == (12, 5)
    train, held_out = open_splits(str(tmp_path), split="validation", validation_split="train")
    assert (len(train), len(held_out)) == (5, 12)


def test_what_is_not_there_is_named(configure: Configure, source: Callable[..., str], tmp_path: Path) -> None:
    given, holdout, nowhere, broken = source(), "data.holdout=4", tmp_path / "nowhere", tmp_path / "broken.parquet"
    broken.write_text("this is no parquet file")
    for overrides, key, value, *facts in (
        ((given, holdout, "data.columns.label=digit"), "data.columns.label", "digit", "image, label"),
        ((given, holdout, "data.split=test"), "data.split", "test", "train"),
        ((given,), "data.validation_split", "validation", "train"),
        ((f"data.source={nowhere}",), "data.source", str(nowhere), "digits"),
        ((f"data.source={broken}",), "data.source", str(broken)),
    ):
        with refused(key, value, *facts):
            build(configure(*overrides))


BAD_ROWS = {  # the new value of a row, and key and value of the refusal
    "label_3": (7, "label", 7),
    "label_5": (-2, "label", -2),
    "image_4": (Image.new("L", (9, 8)), "image", "9x8"),
}


def test_a_bad_row_is_named(configure: Configure, source: Callable[..., str]) -> None:
    options = ["data.holdout=12", "modalities.label.num_classes=3", "modalities.image.size=8"]
    for (change, (value, key, shown)), cache_mib in itertools.product(BAD_ROWS.items(), (512, 0)):
        given, (name, row) = source(**{change: value}), change.split("_")
        path = given.removeprefix("data.source=")
        config = configure(given, *options, f"data.cache_mib={cache_mib}")
        with refused(f"data.columns.{name}={name}, row {row} of {path} (train): {key}", shown):
            build(config).train.all()


def test_a_held_out_selection_names_rows_as_the_source_counts_them(
    configure: Configure, source: Callable[..., str]
) -> None:
    given = source(label_9=7)
    config = configure(given, "data.holdout=3", "modalities.label.num_classes=3")
    with refused(f"data.columns.label=label, row 9 of {given.removeprefix('data.source=')} (train): label", 7):
        build(config).train.all()


def as_read(batch: Batch | InputError) -> Batch | InputError:
    return batch


def loaded(table: Table, batches: list[list[int]], workers: int) -> list[Batch | InputError]:
    visits = [[Visit(row, row) for row in batch] for batch in batches]
    return list(DataLoader(table, batch_sampler=visits, num_workers=workers, collate_fn=as_read))


def test_caching_and_workers_change_nothing(configure: Configure, source: Callable[..., str]) -> None:
    given = [source(), "data.holdout=12"]
    cached, read = (build(configure(*given, f"data.cache_mib={mib}")).train for mib in (512, 0))
    batches = [[0, 1, 2], [10, 3, 3], [7], [6, 5]]
    expected = [cached.batch(batch) for batch in batches]
    assert not equal(expected[0], expected[1])
    for table in (cached, read):
        for workers in (0, 2):
            found = loaded(table, batches, workers)
            assert all(equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_bad_row_comes_out_of_a_worker_as_a_value(configure: Configure, source: Callable[..., str]) -> None:
    for workers in [0, 2]:
        options = ["data.holdout=12", "modalities.label.num_classes=3", "data.cache_mib=0"]
        table = build(configure(source(label_3=7), *options)).train
        good, bad, after = loaded(table, [[0, 1], [2, 3], [4]], workers)
        assert isinstance(bad, InputError) and isinstance(good, Batch) and isinstance(after, Batch)
        assert bad.key.startswith("data.columns.label=label, row 3 of ") and bad.value == 7


def test_a_bad_row_stops_training_with_its_line(configure: Configure, source: Callable[..., str]) -> None:
    from mmdiff.training import train

    options = ["data.holdout=12", "modalities.label.num_classes=3", "data.cache_mib=0", "train.batch_size=2"]
    given = source(label_3=7)
    with refused(f"data.columns.label=label, row 3 of {given.removeprefix('data.source=')} (train): label", 7):
        train(configure(given, *options))


# --------------------------------------------------------------------------------------------------------------- holes

MASKED = ["modalities.masked={kind: masked_image}", "data.masking.masked={pattern: squares, ratio: [0.2, 0.6]}"]


def visits(*pairs: tuple[int, int]) -> list[Visit]:
    return [Visit(row, sample) for row, sample in pairs]


def hidden(batch: Batch) -> torch.Tensor:
    return batch.values["masked"][:, -1] == 0  # (B, H, W)


def test_every_visit_of_a_row_has_another_hole_in_training(configure: Configure) -> None:
    table = build(configure(*MASKED)).train
    batch = table.__getitems__(visits((3, 3), (3, 1501), (3, 2999), (7, 3)))
    image, masked = batch.values["image"], batch.values["masked"]
    assert torch.equal(image[0], image[1]) and not torch.equal(image[0], image[3])
    assert not torch.equal(hidden(batch)[0], hidden(batch)[1]) and not torch.equal(hidden(batch)[1], hidden(batch)[2])
    assert torch.equal(hidden(batch)[0], hidden(batch)[3])  # a function of the sample's number alone
    known = known_masks("squares", (0.2, 0.6), 16, 16, seed=0, positions=torch.tensor([3, 1501, 2999, 3]))
    assert torch.equal(masked[:, -1:], known)
    assert torch.equal(masked[:, :-1], image * known)


def test_a_row_keeps_its_hole_in_evaluation(configure: Configure) -> None:
    table, other = (build(configure(*MASKED, f"train.seed={seed}")).validation for seed in (0, 1))
    whole = table.all()
    assert equal(table.all(), whole) and equal(table.all(40), table.batch(range(40)))
    assert not torch.equal(hidden(whole)[0], hidden(whole)[1])
    assert torch.equal(hidden(table.batch([5, 0, 9])), hidden(whole)[[5, 0, 9]])
    assert not torch.equal(hidden(other.all()), hidden(whole))


def test_the_split_of_a_batch_and_workers_do_not_move_holes_or_hidden_values(configure: Configure) -> None:
    for cache_mib in [512, 0]:
        options = [*MASKED, "data.missing={label: 0.4, masked: 0.3}", f"data.cache_mib={cache_mib}"]
        table = build(configure(*options)).train
        all_visits = visits(*((k * 7 % 31, 100 + k) for k in range(12)))
        whole = table.__getitems__(all_visits)
        parts = [all_visits[:5], all_visits[5:6], all_visits[6:]]
        for workers in (0, 2):
            found = list(DataLoader(table, batch_sampler=parts, num_workers=workers, collate_fn=as_read))
            for field in ("values", "present"):
                for name, tensor in getattr(whole, field).items():
                    assert torch.equal(torch.cat([getattr(part, field)[name] for part in found]), tensor)


def test_without_its_image_a_masked_image_is_missing(configure: Configure, source: Callable[..., str]) -> None:
    batch = build(configure(source(image_3=None), "data.holdout=12", *MASKED)).train.all()
    assert batch.present["image"].tolist() == batch.present["masked"].tolist() == [k != 3 for k in range(11)]
    assert batch.present["label"].tolist() == [k not in (2, 6) for k in range(11)]


# ------------------------------------------------------------------------------------------------------ hidden values


def test_missing_hides_the_stated_share_of_training_rows(configure: Configure) -> None:
    experiment = build(configure("data.missing={label: 0.3, image: 0.1}"))
    batch, count = experiment.train.all(), len(experiment.train)
    for name, share in (("label", 0.3), ("image", 0.1)):
        error = 4 * (share * (1 - share) / count) ** 0.5
        assert float((~batch.present[name]).double().mean()) == pytest.approx(share, abs=error)
    both = float((~batch.present["label"] & ~batch.present["image"]).double().mean())
    assert both == pytest.approx(0.03, abs=4 * (0.03 * 0.97 / count) ** 0.5)  # one says nothing about the other
    held_out = experiment.validation.all()
    assert all(mask.all() for mask in held_out.present.values())


def test_the_same_rows_are_missing_always(configure: Configure) -> None:
    """However often and in whatever order they are visited; another seed hides others."""
    hiding = "data.missing.label=0.5"
    one, again, other = (build(configure(hiding, f"train.seed={seed}")).train for seed in (0, 0, 1))
    present = one.all().present["label"]
    assert torch.equal(again.all().present["label"], present)
    assert not torch.equal(other.all().present["label"], present)
    visited = one.__getitems__(visits((5, 7777), (900, 3), (5, 1)))
    assert visited.present["label"].tolist() == present[[5, 900, 5]].tolist()


def test_all_or_nothing_can_be_missing(configure: Configure) -> None:
    for share, seen in [(0.0, True), (1.0, False)]:
        present = build(configure(f"data.missing.label={share}")).train.all().present["label"]
        assert present.all() if seen else not present.any()


def test_what_was_missing_stays_missing(configure: Configure, source: Callable[..., str]) -> None:
    batch = build(configure(source(), "data.holdout=12", "data.missing.label=0.01")).train.all()
    assert not batch.present["label"][[2, 6]].any()


IMPOSSIBLE = [
    ("data.missing.depth=0.1", "data", "depth"),
    ("data.missing.label=1.5", "data.missing.label", 1.5),
    ("data.masking.depth={pattern: box}", "data", "depth"),
    ("data.masking.label={pattern: stars}", "data.masking.label.pattern", "stars"),
    ("data.masking.label={ratio: 0}", "data.masking.label.ratio", (0.0, 0.0)),
    ("data.options={rows: 3}", "data.options.rows", 3),
]


def test_impossible_holes_and_gaps_are_refused(configure: Configure) -> None:
    for override, key, value in IMPOSSIBLE:
        with refused(key, value):
            build(configure(override))


def test_a_stand_in_has_the_shapes_of_data_and_no_memory(configure: Configure) -> None:
    settings = ["modalities.image={kind: image, channels: 1, size: 16}", "modalities.label.num_classes=10", *MASKED]
    table = build_stand_in(configure(*settings, "modalities.masked={channels: 1, size: 16}")).train
    one, again, other = (table.__getitems__(visits(*((0, k + n) for k in range(3)))) for n in (5, 5, 6))
    assert equal(one, again) and not equal(one, other)
    assert {name: tuple(value.shape) for name, value in one.values.items()} == {
        "image": (3, 1, 16, 16),
        "label": (3,),
        "masked": (3, 2, 16, 16),
    }
    assert len(table) >= 2**20 and all(mask.all() for mask in one.present.values())


@pytest.mark.data
@pytest.mark.parametrize(("name", "space"), [("fashion_mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_the_digits_experiment_trains_on_other_images_unchanged(tmp_path: Path, name: str, space: tuple) -> None:
    from mmdiff.training import train

    source = ROOT.parent / "shared" / "data" / name
    options = ["train.steps=2", "train.batch_size=4", "train.threads=1", "evaluate.at_end=false", "sample.steps=1"]
    options += ["data.cache_mib=0", f"data.source={source}", f"output={tmp_path / 'run'}"]
    folder = train(load_config(ROOT / "experiments" / "digits.yaml", options))
    resolved = load_config(folder / "config.yaml").modalities
    assert resolved["image"].settings() == {"channels": space[0], "size": list(space[1:])}
    assert resolved["label"].settings()["num_classes"] == 10
    assert (folder / "pipeline" / "model_index.json").is_file()
