"""A run that was stopped at any moment continues as if it had not been: weights, averages, moments, metrics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmdiff.config import Config, load_config
from mmdiff.training import train
from mmdiff.training.tracking import MACHINE


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run, without the one entry that measures the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop(key) > 0 for line in lines for key in MACHINE)
    return lines


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Bit-equal states at a step, and equal lines."""
    for name in ("weights", "ema", "optimizer"):
        a, b = (load_file(folder / "checkpoints" / f"step-{step}" / f"{name}.safetensors") for folder in (one, other))
        assert set(a) == set(b) and len(a) > 10
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    pipelines = [load_file(f / "pipeline/model/diffusion_pytorch_model.safetensors") for f in (one, other)]
    assert all(torch.equal(pipelines[0][key], pipelines[1][key]) for key in pipelines[0])
    assert metrics(one) == metrics(other)


@pytest.mark.slow
def test_a_killed_and_a_stopped_run_continue_bit_by_bit(stopped_runs: Any, one_process: Path) -> None:
    assert stopped_runs.one_kept == ["step-20", "step-40"]
    assert_same_run(stopped_runs.one, one_process, 60)


@pytest.mark.slow
def test_sigterm_saves_where_it_stands_and_says_where(stopped_runs: Any) -> None:
    stop = stopped_runs.one_told_to_stop
    assert stop.code == 0, stop.err
    saved = max(int(name.removeprefix("step-")) for name in stopped_runs.one_saved)
    assert 51 <= saved < 60
    assert stop.out.strip() == f"stopped at step {saved} of 60; continue with train.resume=auto"


@pytest.mark.slow
def test_two_killed_processes_continue_bit_by_bit(stopped_runs: Any) -> None:
    assert stopped_runs.two_resumed.code == 0, stopped_runs.two_resumed.err
    assert_same_run(stopped_runs.two, stopped_runs.two_whole, 60)


def test_leftovers_of_a_kill_are_cleared_away(run_copy: Path, finished_run: Path) -> None:
    """A torn last line, a checkpoint that was being written, and lines after the last whole checkpoint."""
    shutil.rmtree(run_copy / "checkpoints" / "step-12")
    shutil.rmtree(run_copy / "pipeline")
    torn = run_copy / "checkpoints" / ".partial-step-12"
    torn.mkdir()
    (torn / "weights.safetensors").write_bytes(b"half")
    with (run_copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')
    overrides = [f"output={run_copy}", "train.resume=auto"]
    assert train(load_config(run_copy / "config.yaml", overrides)) == run_copy
    assert_same_run(run_copy, finished_run, 12)
    assert sorted(path.name for path in (run_copy / "checkpoints").iterdir()) == ["step-12", "step-8"]


def test_a_run_killed_before_its_first_checkpoint_begins_again(run_copy: Path, finished_run: Path) -> None:
    for path in (run_copy / "checkpoints").iterdir():
        shutil.rmtree(path)
    train(load_config(run_copy / "config.yaml", [f"output={run_copy}", "train.resume=auto"]))
    assert_same_run(run_copy, finished_run, 12)


def test_a_run_killed_while_it_finished_gets_its_pipeline_and_grid(run_copy: Path, finished_run: Path) -> None:
    shutil.rmtree(run_copy / "pipeline")
    (run_copy / "samples" / "step-12.png").unlink()
    train(load_config(run_copy / "config.yaml", [f"output={run_copy}", "train.resume=auto"]))
    assert_same_run(run_copy, finished_run, 12)
    grids = [folder / "samples" / "step-12.png" for folder in (run_copy, finished_run)]
    assert grids[0].read_bytes() == grids[1].read_bytes()


def test_another_number_of_threads_is_warned_about(run_copy: Path) -> None:
    overrides = [f"output={run_copy}", "train.resume=auto", "train.threads=2"]
    with pytest.warns(UserWarning, match="step-12 was written with threads = 1, this run has 2"):
        train(load_config(run_copy / "config.yaml", overrides))


def test_log_and_checkpoint_intervals_may_change(configure: Callable[..., Config], tmp_path: Path) -> None:
    """They decide what is written, not what is computed."""
    often = train(configure("train.steps=4", "train.log_every=1", "train.checkpoint_every=1", "train.sample_every=2"))
    seldom = train(configure("train.steps=4", f"output={tmp_path / 'other'}"))
    a, b = (load_file(folder / "checkpoints/step-4/weights.safetensors") for folder in (often, seldom))
    assert all(torch.equal(a[key], b[key]) for key in a)
