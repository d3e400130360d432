"""`mmdiff benchmark speed`: interleaved rounds of the framework's step and of a bare loop."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmdiff.benchmarks.speed import Request, run
from mmdiff.config import Config, parse_config
from mmdiff.errors import InputError
from mmdiff.schedulers import SCHEDULERS

Cli = Callable[..., Any]


def test_the_benchmark_reports_both_sides_and_their_ratio(cli: Cli, tiny_file: Path, tmp_path: Path) -> None:
    answer = cli("benchmark", "speed", tiny_file, "train.batch_size=4", "--rounds", 3, "--steps", 2)
    assert answer.code == 0, answer.err
    assert "batch 4, 3 rounds × 2 steps" in answer.out
    times = {name: float(ms) for name, ms in re.findall(r"^(mmdiff|bare) +([\d.]+) ms CPU", answer.out, re.MULTILINE)}
    found = re.search(r"^ratio +([\d.]+)  \(rounds ([\d.]+) … ([\d.]+)\)$", answer.out, re.MULTILINE)
    assert found is not None and min(times["mmdiff"], times["bare"]) > 0
    ratio, low, high = map(float, found.groups())
    assert 0 < low <= ratio <= high
    assert not (tmp_path / "run").exists()  # it measures, it writes nothing


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


@pytest.mark.parametrize("against", ["bare", "anchor"])
def test_the_other_side_can_be_chosen(shapes: Config, against: str) -> None:
    before = shapes.model_dump()
    text = run(Request(shapes, rounds=1, steps=1, against=against))
    names = re.findall(r"^(\w+) +[\d.]+ ms CPU per step \(median of 1\)$", text, re.MULTILINE)
    assert names == ["mmdiff", against]
    (ratio,) = re.findall(r"^ratio +([\d.]+)  \(rounds \1 … \1\)$", text, re.MULTILINE)  # of one round
    assert float(ratio) > 0
    assert shapes.model_dump() == before


def test_another_side_is_refused(shapes: Config, cli: Cli, tiny_file: Path) -> None:
    with pytest.raises(InputError, match="--against = 'nothing': choose bare, anchor or solver"):
        run(Request(shapes, rounds=1, steps=1, against="nothing"))
    answer = cli("benchmark", "speed", tiny_file, "--against", "nothing")
    assert answer.code == 2 and "choose bare, anchor or solver" in answer.complaint


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_solver_as_the_other_side_measures_sampling(kind: str, cli: Cli, tiny_file: Path, tmp_path: Path) -> None:
    path = [f"scheduler={{kind: {kind}, num_train_timesteps: 50}}", "train.batch_size=2"]
    answer = cli("benchmark", "speed", tiny_file, *path, "--against", "solver", "--rounds", 1, "--steps", 3)
    assert answer.code == 0, answer.err
    pattern = (
        r"^(joint|given the rest): loop (\d+) µs, network (\d+) µs, solver (\d+) µs, overhead (-?\d+) µs per step$"
    )
    found = re.findall(pattern, answer.out, re.MULTILINE)
    assert [title for title, *_ in found] == ["joint", "given the rest"]
    for loop, network, solver, overhead in (map(int, numbers) for _, *numbers in found):
        assert network > 0 and solver > 0 and abs(loop - network - solver - overhead) <= 3
    assert not (tmp_path / "run").exists()
