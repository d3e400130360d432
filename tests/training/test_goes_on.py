"""Runs that go on: extended, continued in a new folder, started from others, damaged, locked, and without room."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

from mmdiff.config import Config, load_config
from mmdiff.errors import InputError, TrainingError
from mmdiff.training import train
from mmdiff.training.learning_rate import learning_rate

Configure = Callable[..., Config]


def again(run: Path, *overrides: str) -> Path:
    return train(load_config(run / "config.yaml", [f"output={run}", "train.resume=auto", *overrides]), progress=False)


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    newest = max((run / "checkpoints").glob("step-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
    return load_file(newest / "weights.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------ learning rates


@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_learning_rates_are_those_of_transformers(kind: str, configure: Configure) -> None:
    config = configure(f"train.lr_scheduler_type={kind}", "train.warmup=10", "train.steps=50").train
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=10, num_training_steps=50)
    for step in range(50):
        ours = learning_rate(step, config)
        if step >= 10 or kind == "constant":  # their warm-up begins with a step of rate 0, ours ends one step earlier
            assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        theirs.step()


def test_a_schedule_ends_at_its_final_value(configure: Configure) -> None:
    for kind in ("linear", "cosine"):
        config = configure(
            f"train.lr_scheduler_type={kind}", "train.min_learning_rate=1e-4", "train.steps=100000"
        ).train
        assert learning_rate(99_999, config) == pytest.approx(1e-4, rel=1e-3)
    for bad in ("train.min_learning_rate=1", "train.min_learning_rate=-1", "train.lr_scheduler_type=step"):
        with pytest.raises(InputError):
            configure(bad)


# ------------------------------------------------------------------------------------------------------------ going on


def test_a_run_is_extended(run_copy: Path) -> None:
    again(run_copy, "train.steps=14")
    assert (run_copy / "checkpoints" / "step-14").is_dir()
    assert load_config(run_copy / "config.yaml").train.steps == 14
    with pytest.raises(InputError, match="train.steps = 13.*has taken 14"):
        again(run_copy, "train.steps=13")


def test_a_run_continues_in_a_new_folder_with_other_settings(run_copy: Path, tmp_path: Path) -> None:
    before = last_weights(run_copy)
    settings = [f"train.resume={run_copy}", "train.steps=14", "train.learning_rate=1e-5", "train.batch_size=4"]
    new = train(load_config(run_copy / "config.yaml", [f"output={tmp_path / 'new'}", *settings]), progress=False)
    origin = json.loads((new / "origin.json").read_text())
    assert origin["step"] == 12 and origin["resume"].endswith("step-12")
    assert same(last_weights(run_copy), before) and not same(last_weights(new), before)
    with pytest.raises(InputError, match="train.steps = 12.*has taken 12"):
        more = [f"output={tmp_path / 'done'}", *settings, "train.steps=12"]
        train(load_config(run_copy / "config.yaml", more), progress=False)
    assert not (tmp_path / "done").exists()
    with pytest.raises(InputError, match="weight.scale"):
        more = [f"output={tmp_path / 'other'}", *settings, "modalities.label.weight.scale=0.5"]
        train(load_config(run_copy / "config.yaml", more), progress=False)


@pytest.mark.parametrize("source", ["", "pipeline", "checkpoints/step-12"])
def test_weights_that_fit_are_taken_and_both_are_listed(source: str, run_copy: Path, tmp_path: Path) -> None:
    more = [f"output={tmp_path / 'new'}", f"train.initialize_from={run_copy / source}", "modalities.label.table_size=2"]
    new = train(load_config(run_copy / "config.yaml", [*more, "train.learning_rate=1e-12"]), progress=False)
    origin = json.loads((new / "origin.json").read_text())
    assert origin["new"] == ["modalities.label.table"] == origin["left"]
    old = load_file(run_copy / "pipeline" / "model" / "diffusion_pytorch_model.safetensors")
    for name in origin["taken"]:
        torch.testing.assert_close(last_weights(new)[f"model.{name}"], old[name], rtol=0, atol=1e-6)


def test_rows_of_classes_follow_their_names(run_copy: Path, tmp_path: Path) -> None:
    names = ",".join(f"'{k}'" for k in reversed(range(10)))
    more = [f"output={tmp_path / 'new'}", f"train.initialize_from={run_copy}", f"modalities.label.names=[{names}]"]
    new = train(load_config(run_copy / "config.yaml", [*more, "train.learning_rate=1e-12"]), progress=False)
    old = load_file(run_copy / "checkpoints" / "step-12" / "ema.safetensors")
    for name in ("table", "head.3.weight", "head.3.bias"):
        name = f"model.modalities.label.{name}"
        torch.testing.assert_close(last_weights(new)[name], old[name].flip(0), rtol=0, atol=1e-6)


def test_a_damaged_source_is_refused(run_copy: Path, tmp_path: Path) -> None:
    source = run_copy / "checkpoints" / "step-12"
    _flip(source / "ema.safetensors")
    with pytest.raises(InputError, match="^train.initialize_from = .*ema.safetensors does not have the hash"):
        more = [f"output={tmp_path / 'new'}", f"train.initialize_from={source}"]
        train(load_config(run_copy / "config.yaml", more), progress=False)


@pytest.mark.parametrize("key", ["train.resume", "train.initialize_from"])
def test_what_a_run_cannot_start_from_is_refused(key: str, run_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "weights.safetensors").symlink_to(run_copy / "checkpoints/step-12/weights.safetensors")
    for source in ("nowhere", "empty", "link"):
        more = [f"output={tmp_path / 'new'}", f"{key}={tmp_path / source}"]
        with pytest.raises(InputError, match=f"^{key} = "):
            train(load_config(run_copy / "config.yaml", more), progress=False)


# --------------------------------------------------------------------------------------------------------- checkpoints


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "a bit": _flip,
    "missing": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"x" * 50),
    "empty": lambda path: path.write_bytes(b""),
}
FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "window.safetensors", "state.json")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    damage: str, run_copy: Path, finished_run: Path, capsys: pytest.CaptureFixture
) -> None:
    for file in FILES:
        DAMAGES[damage](run_copy / "checkpoints" / "step-12" / file)
        again(run_copy)
        line = capsys.readouterr().out
        assert "step-12" in line and "step-8 is used instead" in line and file in line
        assert same(last_weights(run_copy), last_weights(finished_run))


def test_where_all_are_damaged_nothing_is_lost(run_copy: Path) -> None:
    for path in (run_copy / "checkpoints").iterdir():
        (path / "state.json").write_text("{")
    with pytest.raises(InputError, match="every checkpoint is damaged: step-12 .*step-8"):
        again(run_copy)
    assert len(list((run_copy / "checkpoints").iterdir())) == 2


def test_only_names_of_ours_are_read_or_deleted(run_copy: Path) -> None:
    folder = run_copy / "checkpoints"
    for name in ("step-8-best", "step-8.bak", "step-08", "step-", "best", "step-99 copy"):
        shutil.copytree(folder / "step-8", folder / name)
    (folder / "step-x").write_text("mine")
    before = sorted(path.name for path in folder.iterdir())
    again(run_copy, "train.steps=14", "train.checkpoint_every=1", "train.keep_checkpoints=1")
    after = sorted(path.name for path in folder.iterdir())
    assert set(before) - {"step-8", "step-12"} | {"step-14"} == set(after)


def test_other_data_are_refused(run_copy: Path) -> None:
    with pytest.raises(InputError, match="data"):
        again(run_copy, "data.holdout=3")
    state = run_copy / "checkpoints" / "step-12" / "state.json"
    assert {"rows", "columns", "hash"} == set(json.loads(state.read_text())["data"])


@pytest.mark.parametrize(
    "left", [[], ["train.lock"], ["checkpoints"], ["checkpoints", "samples", ".partial-config.yaml"]]
)
def test_a_folder_killed_before_its_first_checkpoint_resumes(
    left: list[str], run_copy: Path, finished_run: Path
) -> None:
    config = load_config(run_copy / "config.yaml", [f"output={run_copy}", "train.resume=auto"])
    shutil.rmtree(run_copy)
    run_copy.mkdir()
    for name in left:
        (run_copy / name).touch() if "." in name else (run_copy / name).mkdir()
    train(config, progress=False)
    assert same(last_weights(run_copy), last_weights(finished_run))


def test_files_follow_the_umask(run_copy: Path) -> None:
    before = os.umask(0o027)
    try:
        again(run_copy, "train.steps=13")
    finally:
        os.umask(before)
    for path in (run_copy / "checkpoints" / "step-13").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


# ---------------------------------------------------------------------------------------------------- locks and faults


def test_a_live_training_holds_its_folder(run_copy: Path) -> None:
    from mmdiff.training import lock

    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        record = {**lock._record(run_copy), "pid": holder.pid, "started": lock._started(holder.pid)}
        (run_copy / "train.lock").write_text(json.dumps(record))
        with pytest.raises(InputError, match=f"process {holder.pid} on .* writes here"):
            again(run_copy, "train.steps=13")
    finally:
        holder.kill()
        holder.wait()
    again(run_copy, "train.steps=13")  # its process is gone: the lock is stale
    assert not (run_copy / "train.lock").exists()


def test_a_file_size_limit_is_one_line_and_leaves_nothing_half_written(run_copy: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(TrainingError, match="limit.*train.resume=auto continues"):
            again(run_copy, "train.steps=13")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in (run_copy / "checkpoints").iterdir()) == ["step-12", "step-8"]
    again(run_copy, "train.steps=13")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_is_one_line_and_the_run_goes_on(run_copy: Path, tmp_path: Path, finished_run: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = 2 * sum(path.stat().st_size for path in run_copy.rglob("*") if path.is_file())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        run = disk / "run"
        shutil.copytree(run_copy, run)
        (disk / "filler").write_bytes(b"x" * (size // 2 - 100_000))
        with pytest.raises(TrainingError, match="disk is full"):
            again(run, "train.steps=14", "train.checkpoint_every=1", "train.keep_checkpoints=9")
        (disk / "filler").unlink()
        shutil.rmtree(run / "checkpoints" / "step-8")
        again(run, "train.steps=14", "train.checkpoint_every=1", "train.keep_checkpoints=1")
        again(run_copy, "train.steps=14")
        assert same(last_weights(run), last_weights(run_copy))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_killed_data_worker_is_one_line(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmdiff.data.table import Table

    def die(self: Any, visits: Any) -> None:
        os.kill(os.getpid(), 9)

    monkeypatch.setattr(Table, "__getitems__", die)
    with pytest.raises(TrainingError, match="reads data was killed.*data.workers"):
        again(run_copy, "train.steps=14", "data.workers=1")
