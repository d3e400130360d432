"""`mmdiff benchmark speed`: interleaved rounds of the framework's step and of a bare loop."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
