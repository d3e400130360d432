"""Rows that cannot be used: named, or skipped and counted, wherever they are met."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from refusals import refused

from mmdiff.build import build
from mmdiff.config import Config
from mmdiff.errors import InputError
from mmdiff.training import train

Configure = Callable[..., Config]
ROWS, BAD = 40, 5
SETTINGS = ["data.holdout=4", "modalities.image.channels=1", "modalities.image.size=8", "modalities.image.resize=true"]


def stored(image: Image.Image, cut: int | None = None) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "JPEG")
    return {"bytes": file.getvalue()[:cut], "path": "photo-5.jpg"}


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., str]:
    """`source(5, 6)`: a parquet file in which these rows are truncated photos."""

    def write(*bad: int) -> str:
        pixels = np.random.default_rng(0).integers(0, 256, (ROWS, 16, 16), dtype=np.uint8)
        images = [stored(Image.fromarray(p), 300 if i in bad else None) for i, p in enumerate(pixels)]
        labels = [i % 3 for i in range(ROWS)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        path = tmp_path / "rows.parquet"
        datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(path)
        return f"data.source={path}"

    return write


@pytest.mark.parametrize(
    "options", [["data.cache_mib=64"], ["data.cache_mib=0"], ["data.cache_mib=0", "data.workers=1"]]
)
def test_a_row_is_named_with_everything_that_finds_it(
    configure: Configure, source: Callable[..., str], options: list[str]
) -> None:
    config = configure(source(BAD), *SETTINGS, *options, "train.steps=30", "train.batch_size=4")
    with pytest.raises(InputError) as caught:
        train(config, progress=False)
    line = str(caught.value)
    for part in (config.data.source, "(train)", f"row {BAD} ", "data.columns.image=image", "photo-5.jpg"):
        assert part in line


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cache_mib", [64, 0])
def test_skipped_values_count_as_absent_and_are_told(
    configure: Configure,
    source: Callable[..., str],
    cache_mib: int,
    workers: int,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["data.on_error=skip", "data.max_errors=0.1", f"data.cache_mib={cache_mib}", f"data.workers={workers}"]
    config = configure(source(BAD), *SETTINGS, *more, "train.steps=10", "train.batch_size=6")
    table = build(config).train
    absent = [not there for there in table.all().present["image"].tolist()]
    assert [i for i, gone in enumerate(absent) if gone] == [4]  # row 5 of the source: every fourth is held out
    folder = train(config, progress=False)
    assert "row 5 of" in caplog.text and "photo-5.jpg" in caplog.text
    assert "1 of 30 rows" in caplog.text
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped_values"] == 1
    assert capsys.readouterr().out.endswith("skipped values, which count as absent: 1 in 30 rows\n")


def test_an_evaluation_tells_what_was_skipped(
    configure: Configure, source: Callable[..., str], cli: Callable[..., Any]
) -> None:
    more = ["data.on_error=skip", "data.max_errors=0.2", "data.cache_mib=0", "train.steps=1", "train.batch_size=2"]
    folder = train(configure(source(5, 7), *SETTINGS, *more), progress=False)  # row 7 is held out
    answer = cli("evaluate", folder, "evaluate.num_samples=4")
    assert answer.code == 0 and "skipped values: " in answer.out
    manifest = json.loads((folder / "evaluation.json").read_text())["manifest"]
    assert manifest["skipped values"] == {"training": 1, "held out": 1}


def test_nothing_is_told_where_nothing_is_skipped(finished_run: Path) -> None:
    assert "skipped_values" not in (finished_run / "metrics.jsonl").read_text()


IDS = Image.fromarray(np.eye(16, dtype=np.uint8))
CLEAR = Image.merge("LA", [IDS, IDS])


UNUSABLE = [
    ("vector", [1.0, 2.0], [1.0, 1e30]),
    ("vector", [1.0, 2.0], [1.0, None]),
    ("embedding", [1.0, 2.0], [0.0, 0.0]),
    ("embedding", [1.0, 2.0], [1e30, 1.0]),
    ("dense", np.eye(16).tolist(), np.full((16, 16), 1e30).tolist()),
    ("mask", IDS, CLEAR),
    ("mask", np.eye(16, dtype=int).tolist(), [[1], [1, 2]]),
]


def test_a_row_that_only_the_settings_read_is_named_or_skipped(configure: Configure, tmp_path: Path) -> None:
    for kind, good, bad in UNUSABLE:
        columns = {"image": [IDS.convert("RGB")] * 20, "x": [bad if row == BAD else good for row in range(20)]}
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")
        options = ["data.holdout=20", "data.columns.label=x", f"modalities.label.kind={kind}", "data.max_errors=0.1"]
        options += [f"data.source={tmp_path / 'rows.parquet'}"]
        with pytest.raises(InputError, match=f"label=x.* row {BAD} of"):
            build(configure(*options))
        table = build(configure(*options, "data.on_error=skip")).train
        assert table.all().present["label"].tolist() == [row != BAD for row in range(19)]


def test_too_many_stop_the_run(configure: Configure, source: Callable[..., str]) -> None:
    config = configure(source(4, 5, 6), *SETTINGS, "data.on_error=skip", "data.max_errors=0.05", "data.cache_mib=64")
    with refused("data.on_error", "3 unusable values in 30 rows", "data.max_errors = 0.05"):
        build(config)


def cut_tiff() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "TIFF")
    return file.getvalue()[:-2000]


@pytest.mark.parametrize("data", [b"no image", cut_tiff()], ids=["text", "cut TIFF"])
def test_settings_are_read_around_them(
    configure: Configure, source: Callable[..., str], tmp_path: Path, data: bytes
) -> None:
    path = source().removeprefix("data.source=")
    rows = datasets.load_dataset("parquet", data_files=path, split="train")
    images = [
        {"bytes": data, "path": None},
        *rows.cast_column("image", datasets.Image(decode=False))["image"][1:],
    ]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    broken = tmp_path / "broken.parquet"
    datasets.Dataset.from_dict({"image": images, "label": rows["label"]}, features=features).to_parquet(broken)
    options = [f"data.source={broken}", "data.holdout=4", "data.max_errors=0.1"]
    with pytest.raises(InputError, match="data.columns.image=image: row 0 of .*broken.parquet"):
        build(configure(*options))
    resolved = build(configure(*options, "data.on_error=skip")).config
    assert resolved.modalities["image"].settings()["size"] == [16, 16]
