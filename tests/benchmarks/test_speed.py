"""`mmdiff benchmark speed`: interleaved rounds of the framework's step and of a bare loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmdiff.benchmarks.speed import Request, run
from mmdiff.config import Config, parse_config
from mmdiff.errors import InputError
from mmdiff.schedulers import SCHEDULERS

Cli = Callable[..., Any]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "speed.json").read_text())["rows"]


def test_the_benchmark_reports_both_sides_and_their_ratio(cli: Cli, tiny_file: Path, tmp_path: Path) -> None:
    answer = cli(
        "benchmark", "speed", tiny_file, "train.batch_size=4", "--rounds", 3, "--steps", 2, "--out", tmp_path / "speed"
    )
    assert answer.code == 0, answer.err
    (row,) = rows_of(tmp_path / "speed")
    assert min(row["mmdiff_ms"], row["other_ms"]) > 0 and len(row["rounds"]) == 3
    assert row["ratio"] == sorted(row["rounds"])[1] and row["reached"] == (row["ratio"] <= 1.08)
    assert f"{row['mmdiff_ms']:.1f} ms" in answer.out and "medians of 3 rounds of 2 steps" in answer.out
    assert not (tmp_path / "run").exists()  # it measures, it trains nothing


@pytest.fixture
def shapes(tiny: dict[str, Any]) -> Config:
    """Label, masked image and values that are missing: all that the anchor alone must do without."""
    tiny["data"] = {
        "source": "shapes",
        "options": {"rows": 16, "validation_rows": 4, "size": 16},
        "masking": {"masked_image": {}},
        "columns": {"color": "color"},
        "missing": {"color": 0.5},
    }
    tiny["modalities"] |= {"masked_image": {"kind": "masked_image"}, "color": {"kind": "label"}}
    tiny["train"]["batch_size"] = 4
    return parse_config(tiny)


@pytest.mark.parametrize("against", ["bare", "anchor", "diffusers", "muon"])
def test_the_other_side_can_be_chosen(shapes: Config, against: str, tmp_path: Path) -> None:
    before = shapes.model_dump()
    run(Request((shapes,), rounds=1, steps=1, against=against, out=tmp_path))
    (row,) = rows_of(tmp_path)
    assert row["against"] == against and row["rounds"] == [row["mmdiff_ms"] / row["other_ms"]]
    assert shapes.model_dump() == before


def test_another_side_is_refused(shapes: Config, cli: Cli, tiny_file: Path) -> None:
    with pytest.raises(InputError, match="--against = 'nothing': choose bare, anchor"):
        run(Request((shapes,), rounds=1, steps=1, against="nothing"))
    answer = cli("benchmark", "speed", tiny_file, "--against", "nothing")
    assert answer.code == 2 and "--against = 'nothing'" in answer.complaint


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_solver_as_the_other_side_measures_sampling(kind: str, cli: Cli, tiny_file: Path, tmp_path: Path) -> None:
    path = [f"scheduler={{kind: {kind}, num_train_timesteps: 50}}", "train.batch_size=2"]
    options = ["--against", "solver", "--rounds", 1, "--steps", 3, "--out", tmp_path / "speed"]
    answer = cli("benchmark", "speed", tiny_file, *path, *options)
    assert answer.code == 0, answer.err
    found = rows_of(tmp_path / "speed")
    assert [row["against"] for row in found] == ["solver, joint", "solver, given the rest"]
    for row in found:
        assert row["network_us"] > 0 and row["solver_us"] > 0
        rest = row["loop_us"] - row["network_us"] - row["solver_us"]
        assert row["overhead_us"] == pytest.approx(rest, abs=1e-6)
    assert not (tmp_path / "run").exists()
