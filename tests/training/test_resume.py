"""A run that was stopped at any moment continues as if it had not been: weights, averages, moments, metrics."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import tiny_tree
from omegaconf import OmegaConf
from processes import Ended, assert_close
from safetensors.torch import load_file

from mmdiff.config import Config, load_config
from mmdiff.data import Order
from mmdiff.data.order import MicroBatches
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


# windows of three steps straddle the checkpoints at 20 and 40, parts and processes split the batch of 12
SIXTY_STEPS = [
    "train.steps=60",
    "train.checkpoint_every=20",
    "train.accumulate=2",
    "train.resume=auto",
    "loss.uncertainty=true",
    "data.augment={flip: 0.5, crop: [0.5, 1.0], contrast: 0.3}",
]


@pytest.fixture(scope="module")
def sixty_steps(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """`sixty_steps(output, …)`: the arguments of `mmdiff train` for a tiny run of 60 steps."""
    path = tmp_path_factory.mktemp("sixty") / "tiny.yaml"
    OmegaConf.save(OmegaConf.create(tiny_tree(path.parent / "run")), path)
    return lambda output, *more: [str(path), f"output={output}", *SIXTY_STEPS, *more]


@pytest.fixture(scope="module")
def one_process(sixty_steps: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of 60 uninterrupted steps in this process."""
    config, *overrides = sixty_steps(tmp_path_factory.mktemp("one") / "run")
    return train(load_config(config, overrides))


class StoppedRuns(NamedTuple):
    """Run folders of 60 steps that were stopped on the way and resumed."""

    one: Path  # under `accelerate launch`, SIGKILL after 42; SIGTERM after 51; the rest in this process
    one_kept: list[str]  # its checkpoints after the SIGKILL
    one_told_to_stop: Ended  # by the SIGTERM
    one_saved: list[str]  # its checkpoints after that
    two: Path  # two processes under torchrun, SIGKILL after 42
    two_resumed: Any
    two_whole: Path  # two processes, never stopped


@pytest.fixture(scope="module")
def stopped_runs(
    launch: Callable[..., Any],
    forked: Callable[..., Any],
    sixty_steps: Callable[..., list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> StoppedRuns:
    """All at once; what a launcher started is killed, and goes on under torchrun or without a launcher."""
    folder = tmp_path_factory.mktemp("stopped")
    one, two, two_whole = folder / "one", folder / "two", folder / "two-whole"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "-m", "mmdiff"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "mmdiff"]

    def start(output: Path, log: str, command: list[str], *more: str) -> Any:
        return launch([*command, "train", *sixty_steps(output, *more)], folder / log, ACCELERATE_USE_CPU="1")

    def kept(output: Path) -> list[str]:
        assert not (output / "pipeline").exists(), "the run was over before it could be stopped"
        return sorted(path.name for path in (output / "checkpoints").glob("step-*"))

    def stop_one() -> tuple[list[str], Ended, list[str]]:
        first = start(one, "one-first", accelerate, "data.workers=2")
        first.wait_for(one / "metrics.jsonl", '"step": 42,')
        first.kill()
        after_kill = kept(one)
        second = forked(["train", *sixty_steps(one, "data.workers=2")], folder / "one-second")
        second.wait_for(one / "metrics.jsonl", '"step": 51,')
        second.processes[0].terminate()
        return after_kill, second.wait(), kept(one)

    def stop_two() -> Any:
        first = start(two, "two-first", torchrun)
        first.wait_for(two / "metrics.jsonl", '"step": 42,')
        first.kill()
        assert kept(two) == ["step-20", "step-40"]
        return start(two, "two-second", torchrun).wait()

    with ThreadPoolExecutor() as pool:
        futures = pool.submit(stop_one), pool.submit(stop_two)
        whole = forked(["train", *sixty_steps(two_whole)], folder / "two-whole-log", processes=2).wait()
        assert whole.code == 0, whole.err
        one_facts, two_resumed = futures[0].result(), futures[1].result()
    config, *overrides = sixty_steps(one)
    train(load_config(config, overrides))
    return StoppedRuns(one, *one_facts, two, two_resumed, two_whole)


def test_parts_add_up(one_process: Path, sixty_steps: Callable[..., list[str]], tmp_path: Path) -> None:
    config, *overrides = sixty_steps(tmp_path / "run", "train.accumulate=1")
    assert_close(train(load_config(config, overrides)), one_process)


@pytest.mark.slow
def test_two_processes_compute_what_one_computes(one_process: Path, stopped_runs: Any) -> None:
    state = json.loads((stopped_runs.two_whole / "checkpoints" / "step-60" / "state.json").read_text())
    assert (state["processes"], state["threads"]) == (2, 1)
    assert_close(stopped_runs.two_whole, one_process)
    shares = [list(MicroBatches(Order(1498, 0), 0, 6, 12, 2, rank, 2)) for rank in (0, 1)]  # the run's own numbers
    one, other = ({visit.row for batch in share for visit in batch} for share in shares)
    assert len(one) == len(other) == 36 and not one & other


@pytest.mark.slow
def test_accelerate_launch_computes_the_same(one_process: Path, stopped_runs: Any) -> None:
    assert_close(stopped_runs.one, one_process)  # its first 42 steps ran under `accelerate launch`


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
