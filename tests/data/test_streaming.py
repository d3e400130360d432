"""Streamed rows are the rows of the files: nothing is copied, lost or repeated, and what cannot be read is named."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from refusals import refused
from safetensors.torch import load_file

from mmdiff.build import build
from mmdiff.config import Config
from mmdiff.data import open_splits
from mmdiff.data.files import ROW, undecoded
from mmdiff.data.streamed import StreamedRows, open_streamed
from mmdiff.training import train

SIZES = (13, 7, 22, 9)  # rows of the shards
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["a", "b", "c"]),
        "vector": datasets.List(datasets.Value("float32")),
    }
)
TAR = ["data.columns.image=png", "data.columns.label=cls", "modalities.label.num_classes=3"]
Configure = Callable[..., Config]


def picture(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pack(file: Path, members: Mapping[str, bytes | str]) -> Path:
    """A tar; a text is the target of a link."""
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
            info.size = len(data) if isinstance(data, bytes) else 0
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return file


def write(folder: Path, kind: str, sizes: tuple[int, ...] = SIZES, first: int = 0) -> str:
    """Shards of one kind; parquet files have row groups of four."""
    folder.mkdir(exist_ok=True)
    for shard, size in enumerate(sizes):
        rows, file = range(first, first + size), folder / f"shard-{shard}.{kind}"
        first += size
        columns = {
            "image": [{"bytes": picture(n), "path": None} for n in rows],
            "label": [n % 3 for n in rows],
            "vector": [[n, 1.0] for n in rows],
        }
        table = datasets.Dataset.from_dict(columns, features=FEATURES).with_format("arrow")[:]
        if kind == "parquet":
            pq.write_table(table, file, row_group_size=4)
        elif kind == "arrow":
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        else:
            members = {}
            for n in rows:
                array = io.BytesIO()
                np.save(array, np.array([n, 1.0], dtype=np.float32))
                label, note = str(n % 3).encode(), json.dumps({"n": n}).encode()
                members |= {f"{n}.png": picture(n), f"{n}.cls": label, f"{n}.json": note, f"{n}.npy": array.getvalue()}
            pack(file, members)
    return str(folder)


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in row.items()
        if name not in (ROW, "__url__")
    }


@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
def test_streamed_rows_are_those_that_are_copied_otherwise(kind: str, tmp_path: Path) -> None:
    source = write(tmp_path / "data", kind)
    copied, streamed = (open_splits(source, holdout=5, streams=streams) for streams in (0, 4))
    for ours, theirs in zip(streamed, map(undecoded, copied), strict=True):
        assert isinstance(ours, StreamedRows) and len(ours) == len(theirs) == sum(map(sum, ours.shards))
        assert {name: repr(ours.features[name]) for name in ours.features} == {
            name: repr(theirs.features[name]) for name in theirs.features if name != ROW
        }
        there = pickle.loads(pickle.dumps(ours))  # what a spawned worker gets
        for index in [*range(len(ours)), 3, 0]:
            assert plain(ours[index]) == plain(there[index]) == plain(theirs[index])
        assert len(pickle.dumps(ours)) < 4000
    assert streamed[1][1][ROW] == "9 of shard-0." + kind and streamed[0][10][ROW] == "12 of shard-0." + kind


def test_few_blocks_are_open_and_read_ones_are_closed(tmp_path: Path) -> None:
    rows, _ = open_splits(write(tmp_path / "data", "parquet"), holdout=5, streams=3)
    for index in torch.randperm(len(rows)).tolist():
        rows[index]
        assert len(rows._open) <= 4
    rows = rows.select(range(len(rows)))
    for index in range(len(rows)):
        rows[index]
        assert len(rows._open) <= 1
    assert not rows._open


def test_splits_are_those_of_the_files_names_wherever_they_lie(tmp_path: Path) -> None:
    """As on the hub: shards of a data set's splits, read through a file system."""
    memory = fsspec.filesystem("memory")
    write(tmp_path / "train", "parquet")
    write(tmp_path / "validation", "parquet", (5,), first=100)
    train, held_out = open_splits(str(tmp_path), streams=2)
    assert (len(train), len(held_out)) == (51, 5)
    files = {split: [f"memory://{split}-{n}.parquet" for n in range(k)] for split, k in (("train", 4), ("test", 1))}
    for split, folder in (("train", "train"), ("test", "validation")):
        for number, url in enumerate(files[split]):
            memory.pipe(url.removeprefix("memory:/"), (tmp_path / folder / f"shard-{number}.parquet").read_bytes())
    remote = open_streamed(2, "parquet", data_files=files)
    assert [plain(remote["train"][i]) for i in range(51)] == [plain(train[i]) for i in range(51)]
    assert [plain(remote["test"][i]) for i in range(5)] == [plain(held_out[i]) for i in range(5)]


def test_paths_and_bytes_in_shards_are_images(configure: Configure, tmp_path: Path) -> None:
    for kind in ("path", "bytes"):
        for n in range(20):
            (tmp_path / f"{n}.png").write_bytes(picture(n))
        column = [f"{n}.png" if kind == "path" else picture(n) for n in range(20)]
        pq.write_table(pa.table({"image": column, "label": [n % 2 for n in range(20)]}), tmp_path / "rows.parquet")
        options = [f"data.source={tmp_path / 'rows.parquet'}", "data.holdout=4", "modalities.label.num_classes=2"]
        copied, streamed = (build(configure(*options, f"data.streaming={on}")).train for on in (False, True))
        assert torch.equal(copied.all().values["image"], pickle.loads(pickle.dumps(streamed)).all().values["image"])


def test_a_folder_of_images_may_be_streamed_too(configure: Configure, tmp_path: Path) -> None:
    for n in range(12):
        (tmp_path / "pets" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / "ab"[n % 2] / f"{n}.png").write_bytes(picture(n))
    options = [f"data.source={tmp_path / 'pets'}", "data.holdout=4"]
    one, other = (build(configure(*options, f"data.streaming={on}")).train for on in (False, True))
    assert torch.equal(one.all().values["image"], other.all().values["image"]) and other._cache is None


# ------------------------------------------------------------------------------------------------------------ training


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / "weights.safetensors")


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_workers_and_a_stop_in_the_middle_of_an_epoch_change_no_bit(
    kind: str, configure: Configure, tmp_path: Path
) -> None:
    source = write(tmp_path / "data", kind)
    more = [f"data.source={source}", "data.holdout=5", "data.streaming=true", "data.streams=6", "train.accumulate=2"]
    more += ["train.steps=8", "train.resume=auto", "train.checkpoint_every=3", *(TAR if kind == "tar" else [])]
    whole = train(configure(*more, f"output={tmp_path / 'whole'}"), progress=False)
    run = train(configure(*more, "data.workers=2"), progress=False)
    assert same(whole, run)
    for lost in (run / "checkpoints" / "step-8", run / "pipeline"):
        shutil.rmtree(lost)
    assert same(whole, train(configure(*more, "data.workers=3"), progress=False))
    shutil.rmtree(run / "checkpoints" / "step-8")
    if kind == "parquet":  # as many rows in a file of the same size, one pixel is another
        changed = Path(source) / "shard-2.parquet"
        changed.write_bytes(changed.read_bytes().replace(picture(33)[-30:], picture(33)[-30:-1] + b"!"))
    else:
        write(Path(source), kind, first=1)
    with refused("data.source", source, "step-6"):
        train(configure(*more), progress=False)


@pytest.mark.slow
def test_two_processes_with_workers_read_the_batches_of_one(
    configure: Configure, forked: Callable[..., Any], tiny_file: Path, tmp_path: Path
) -> None:
    more = [f"data.source={write(tmp_path / 'data', 'parquet')}", "data.holdout=5", "data.streaming=true"]
    more += ["data.streams=4", "train.steps=12", "train.log_every=3", "train.checkpoint_every=6"]
    two = ["train", tiny_file, *more, "data.workers=3", "train.accumulate=2", f"output={tmp_path / 'two'}"]
    started = forked(two, tmp_path / "log", processes=2)
    one = train(configure(*more), progress=False)
    answer = started.wait()
    assert answer.code == 0, answer.err
    for line, other in zip(*(metrics(run) for run in (one, tmp_path / "two")), strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-6)
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-12")
    shutil.rmtree(tmp_path / "two" / "pipeline")
    with pytest.warns(UserWarning, match="processes = 2, this run has 1"):
        train(configure(*more, f"output={tmp_path / 'two'}", "train.accumulate=2", "train.resume=auto"), progress=False)
    assert metrics(one)[-1] == pytest.approx(metrics(tmp_path / "two")[-1], rel=1e-3, abs=1e-6)


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", "loss", "l1", "l2/label")} for line in lines]


def test_one_tar_trains_as_the_rows_in_memory_do(configure: Configure, tmp_path: Path) -> None:
    """One block has the order of rows that are not streamed, so the weights are the same."""
    more = [f"data.source={write(tmp_path / 'data', 'tar', (40,))}", "data.holdout=5", *TAR, "train.steps=8"]
    runs = [
        train(configure(*more, f"data.streaming={on}", f"output={tmp_path / str(on)}"), progress=False)
        for on in (True, False)
    ]
    assert same(*runs)


def same(one: Path, other: Path) -> bool:
    files = (run / "checkpoints" / "step-8" / "weights.safetensors" for run in (one, other))
    ours, theirs = map(load_file, files)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------------------------------------------- what is refused


def test_what_is_no_shard_is_refused(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("image,label\n1.png,0\n")
    for source in ("digits", str(tmp_path / "rows.csv")):
        with refused("data.streaming", True):
            build(configure(f"data.source={source}", "data.streaming=true"))
    with refused("data.options.columns", ["image"], "revision"):  # of a hub name, before it is asked
        open_splits("user/name", options={"columns": ["image"]}, streams=2)
    source = f"data.source={write(tmp_path / 'data', 'parquet')}"
    embedding = ["modalities.clip.kind=embedding", "data.embeddings.clip.model=ViT-B-32"]
    with refused("data.embeddings.clip", "ViT-B-32", "mmdiff encode"):
        build(configure(source, "data.streaming=true", "data.holdout=5", *embedding))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["modalities.label.kind=label", "data.columns.label=cls"], "modalities.label.num_classes"),
        (["modalities.label.kind=label", "data.columns.label=__key__"], "modalities.label.names"),
        (["modalities.label.kind=vector", "data.columns.label=npy"], "modalities.label.mean"),
        (["modalities.label.kind=mask", "data.columns.label=png"], "modalities.label.num_classes"),
    ],
)
def test_a_setting_that_only_all_rows_tell_must_be_set(
    configure: Configure, tmp_path: Path, settings: list[str], key: str
) -> None:
    source = [f"data.source={write(tmp_path / 'data', 'tar')}", "data.columns.image=png", "data.holdout=5"]
    build(configure(*source, *settings[:0], "data.columns.label=cls"))  # all rows tell
    with refused(key, None):
        build(configure(*source, *settings, "data.streaming=true"))


def test_settings_are_read_off_features_and_first_rows(configure: Configure, tmp_path: Path) -> None:
    source = [f"data.source={write(tmp_path / 'data', 'parquet')}", "data.holdout=5", "modalities.vector.kind=vector"]
    vector = ["modalities.vector.mean=[20, 1]", "modalities.vector.std=[9, 1]"]
    one, other = (build(configure(*source, *vector, f"data.streaming={on}")).config for on in (False, True))
    assert one.modalities == other.modalities


MEMBERS = {"1.png": picture(1), "1.cls": b"0", "2.png": picture(2), "2.cls": b"1"}
BAD_TARS: list[tuple[Mapping[str, bytes | str], str]] = [
    ({"1.pyd": b"x"}, "1.pyd"),
    ({"1.pkl": b"x"}, "1.pkl"),
    ({"1.pth": b"x"}, "1.pth"),
    ({"../1.cls": b"1"}, "../1.cls"),
    ({"/1.cls": b"1"}, "/1.cls"),
    ({"1.json": "/etc/passwd"}, "1.json"),
    ({"1.json.gz": b"x"}, "1.json.gz"),
]


@pytest.mark.parametrize(("members", "name"), BAD_TARS, ids=[name for _, name in BAD_TARS])
def test_a_tar_that_could_do_harm_is_refused(members: Mapping[str, bytes | str], name: str, tmp_path: Path) -> None:
    file = pack(tmp_path / "a.tar", {**MEMBERS, **members})
    with refused("data.source", str(file), name):
        open_splits(str(file), holdout=2, streams=2)
    (tmp_path / "photo.png").write_bytes(picture(1))  # a tar in a folder of images is no shard, but looked into
    if not name.endswith(".gz"):
        with refused("data.source", str(file), name):
            open_splits(str(tmp_path), holdout=2, streams=2)


def test_a_shard_that_lacks_a_column_is_named_before_the_training(configure: Configure, tmp_path: Path) -> None:
    source = write(tmp_path / "data", "parquet")
    lacking = Path(source) / "shard-3.parquet"
    pq.write_table(pq.read_table(lacking).drop_columns("label"), lacking)
    options = [f"data.source={source}", "data.holdout=5", "data.streaming=true"]
    with refused("data.source", str(lacking), "label"):
        build(configure(*options))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
def test_a_cut_file_is_named(kind: str, tmp_path: Path) -> None:
    source = write(tmp_path / "data", kind)
    cut = Path(source) / f"shard-2.{kind}"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with refused("data.source", str(cut)):
        open_splits(source, holdout=2, streams=2)


def test_a_broken_row_is_named_or_skipped(configure: Configure, tmp_path: Path) -> None:
    members = {f"{n}.png": picture(n) for n in range(6)} | {f"{n}.cls": b"1" for n in range(6)}
    members = {name: members[name] for name in sorted(members)}
    members |= {"5.png": picture(5)[:60], "9.cls": b"?", "9.png": picture(9)}
    for number in (0, 1):
        pack(tmp_path / f"shard-{number}.tar", {**MEMBERS} if number == 0 else members)
    source = [f"data.source={tmp_path / '*.tar'}", "data.streaming=true", "data.validation_split=train", *TAR]
    batch = build(configure(*source, "data.on_error=skip", "data.max_errors=0.5")).train.all()
    assert len(batch.unusable) == 2 and "row 5 of shard-1.tar" in batch.unusable[0]
    assert batch.present["image"].tolist() == [True, True, *[True] * 5, False, False]
    with refused("data.source", str(tmp_path / "shard-1.tar"), "row 6", "9"):
        open_splits(str(tmp_path / "*.tar"), validation_split="train", streams=2)[0][8]
