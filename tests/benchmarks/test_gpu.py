"""`mmdiff benchmark gpu` at toy size: every part runs, and what fails or has no time left is a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdiff.benchmarks.gpu import measures
from mmdiff.benchmarks.gpu import run as gpu_run
from mmdiff.benchmarks.gpu.run import Request, run
from mmdiff.errors import InputError

Cli = Callable[..., Any]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_a_cpu_is_refused_by_name(cli: Cli, tmp_path: Path) -> None:
    answer = cli("benchmark", "gpu", "--out", tmp_path / "gpu")
    assert answer.code == 2 and answer.complaint.startswith("device = 'cpu'")
    assert not (tmp_path / "gpu").exists()


def test_every_part_runs_at_toy_size_and_a_part_that_fails_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(size: Any, name: str) -> dict[str, Any]:
        raise RuntimeError("as an accelerator may")

    monkeypatch.setattr(measures, "losses", broken)
    told: list[str] = []
    text = run(Request(tmp_path / "gpu", budget=5.0, toy=True), told.append)
    results = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    parts = results["parts"]
    assert {name for name, part in parts.items() if "not_measured" in part} == {"bf16 against fp32"}
    assert len(told) == len(parts) and (tmp_path / "gpu" / "gpu.txt").read_text() == text + "\n"
    for network in ("DiT bf16", "DiT bf16 compiled", "U-Net fp32"):
        assert 0 < parts[network]["mfu"] < 1 and parts[network]["images_per_second"] > 0
    assert parts["U-Net fp32"]["gflops_per_image"] == parts["U-Net bf16"]["gflops_per_image"] > 0
    assert parts["killed and resumed"]["differing_weights"] == 0
    assert 0 < parts["killed and resumed"]["killed_after_step"] <= parts["killed and resumed"]["steps"]
    assert (tmp_path / "gpu" / parts["training on shapes"]["curve"]).stat().st_size > 1000
    with pytest.raises(InputError, match="--out"):
        run(Request(tmp_path / "gpu", toy=True))


def test_the_time_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part begins only while five seconds are left, and takes no more than are left; the rest is told."""
    begun: list[float] = []
    within = gpu_run._within
    monkeypatch.setattr(gpu_run, "_within", lambda seconds: begun.append(seconds) or within(seconds))
    run(Request(tmp_path / "gpu", budget=0.1, toy=True))
    results = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    assert results["seconds"] < 30
    assert begun and all(5 <= seconds <= 6 for seconds in begun) and begun == sorted(begun, reverse=True)
    assert len(begun) < len(results["parts"])
    assert "not_measured" in list(results["parts"].values())[-1]
