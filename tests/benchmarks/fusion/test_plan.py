"""`mmdiff benchmark fusion --dry-run`, and the whole way of products with photos: sample, dry run, benchmark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmdiff.data.abo_sample import write_sample

Cli = Callable[..., Any]
EXPERIMENTS = sorted((Path(__file__).parents[3] / "experiments" / "fusion").glob("abo_*.yaml"))
TOY = [
    *("model=null", "small.kind=blip-2", "small.width=16", "small.layers=1", "small.patch=16", "data.size=32"),
    *("pretraining.steps=1", "training.steps=1", "seeds=1", "test.rows=6", "test.views=[1,3]", "hidden=4"),
    *("test.distractors=[0,0.5]", "new_tokens=2", "entries=[mean, attention, best single image]"),
]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("abo") / "sample", products=40, size=32, most=5)


def call(path: Path, folder: Path, *more: str) -> list[Any]:
    captions = [f"data.options.captions={folder / 'captions.csv'}"] if "captions:" in path.read_text() else []
    return ["benchmark", "fusion", path, f"data.options.folder={folder}", *captions, *more]


def cells(text: str) -> list[list[str]]:
    """The rows of the table, without the titles."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_dry_run_says_what_the_experiment_would_do_and_writes_nothing(
    path: Path, sample: Path, cli: Cli, tmp_path: Path
) -> None:
    """With the published model's name: nobody is asked for it."""
    before = sorted(sample.rglob("*"))
    answer = cli(*call(path, sample, "--dry-run", "--out", tmp_path / "out"))
    assert answer.code == 0, answer.err
    assert sorted(sample.rglob("*")) == before and list(tmp_path.iterdir()) == []
    (training, *held_out) = cells(answer.out)
    assert training[0] == "training" and training[2] == "2 … 5" and len(held_out) == 12
    assert int(training[1]) + int(held_out[0][1]) == (39 if path.stem == "abo_attributes" else 40)
    assert [row[4] for row in held_out[:4]] == ["0"] * 4 and all(int(row[4]) > 0 for row in held_out[5:8])
    assert "1 are left out" in answer.out or path.stem != "abo_attributes"
    assert "× 5 seeds" in answer.out and "; 0 stored already" in answer.out


def test_the_benchmark_does_what_the_dry_run_said(sample: Path, cli: Cli, tmp_path: Path) -> None:
    path = next(path for path in EXPERIMENTS if path.stem == "abo_attributes")
    asked = call(path, sample, *TOY, "--out", tmp_path)
    planned = cli(*asked, "--dry-run")
    assert planned.code == 0 and "3 entries × 1 seeds = 3 parts; 0 stored already" in planned.out, planned.err
    answer = cli(*asked)
    assert answer.code == 0, answer.err
    manifest = json.loads((tmp_path / "abo_attributes.json").read_text())["manifest"]
    (number,) = {int(row[1]) for row in cells(planned.out)[1:]}
    assert manifest["held-out sets per number of photos and share of distractors"] == number
    different = manifest["different answers among them"]
    assert re.search(rf"attributes: \d+ different answers in training, {different} held out", planned.out)
    written = sorted(path for path in tmp_path.rglob("*"))
    again = cli(*asked, "--dry-run")
    assert "3 parts; 3 stored already" in again.out and sorted(tmp_path.rglob("*")) == written
    assert again.out.replace("3 stored", "0 stored") == planned.out
    assert "; 0 stored already" in cli(*asked, "--dry-run", "hidden=5").out


def test_what_would_stop_a_run_stops_a_dry_run(cli: Cli, tmp_path: Path) -> None:
    path = next(path for path in EXPERIMENTS if path.stem == "abo_category")
    root = write_sample(tmp_path / "sample", products=30, size=16, most=2)
    for key, value, more in (
        ("fusion.data", "'weight'", ["tasks.category.columns=[weight]"]),
        ("fusion.tasks", "['caption']", ["tasks.category.columns=[caption]"]),
        ("folder", "'path/to/abo'", ["data.options.folder=path/to/abo"]),
        ("fusion.data.source", "'someone/something'", ["data.source=someone/something"]),
        ("--device", "'abacus'", ["--device", "abacus"]),
        ("--device", "'cuda'", ["--device", "cuda", "learner=classifier"]),
    ):
        answer = cli(*call(path, root, *more, "--dry-run", "--out", tmp_path / "out"))
        assert answer.code == 2 and answer.complaint.startswith(f"{key} = {value}"), answer.err
    photo = next((root / "images" / "small").rglob("*.jpg"))
    photo.write_bytes(photo.read_bytes()[:300])
    answer = cli(*call(path, root, "--dry-run", "--out", tmp_path / "out"))
    assert answer.code == 2 and photo.name in answer.complaint
