"""Processes that share the state compute what one computes, go on in any number, and refuse what is damaged."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from campaign import bits
from conftest import tiny_tree

from mmdiff.config import Config
from mmdiff.errors import InputError
from mmdiff.training import train
from mmdiff.training.checkpoint import read_checkpoint
from mmdiff.training.sealed import DamagedError

ROOT = Path(__file__).parents[2]
LAUNCH_FILES = ROOT / "experiments" / "accelerate"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, forked: Callable[..., Any]) -> Path:
    """The folders of trainings of one process, or of a pair on gloo."""
    folder = tmp_path_factory.mktemp("sharding")
    tree = tiny_tree(folder / "run")
    tree["modalities"]["label"]["weight"] = {"schedule": "learned", "learn_scale": True}  # a scalar, which has no parts
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    always = ["train.checkpoint_every=6", "train.resume=auto", "train.lr_scheduler_type=constant"]

    def run(name: str, processes: int, *more: str) -> None:
        settings = [f"output={folder / name}", "train.steps=12", *always, *more]
        answer = forked(["train", folder / "tiny.yaml", *settings], folder / "log", processes).wait()
        assert answer.code == 0, (name, answer.err)

    def go_on(name: str, origin: str, processes: int, *more: str) -> None:
        """As if the other run had been killed after six steps."""
        shutil.copytree(folder / origin, folder / name)
        shutil.rmtree(folder / name / "checkpoints" / "step-12")
        run(name, processes, *more)

    sharded = "train.sharding=fsdp2"
    run("one", 1)
    run("ddp", 2)
    run("parts", 2, sharded, "train.accumulate=2")
    run("fsdp2", 2, sharded)
    go_on("stopped", "fsdp2", 2, sharded)
    go_on("fewer", "fsdp2", 1)
    go_on("more", "one", 2, sharded)
    if importlib.util.find_spec("deepspeed"):
        zero2 = "train.sharding=zero2", "modalities.label.weight.learn_scale=false"
        run("zero2", 2, *zero2)
        go_on("zero2-stopped", "zero2", 2, *zero2)
        assert bits(folder / "zero2-stopped") == bits(folder / "zero2")
    assert bits(folder / "stopped") == bits(folder / "fsdp2")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "parts", "stopped", "fewer", "more"])
def test_losses_are_those_of_one_process(runs: Path, name: str) -> None:
    """Under DDP, FSDP2 and accumulation; from two processes to one, and back, whose rows are in the same order."""
    one, other = (
        [json.loads(line) for line in (runs / n / "metrics.jsonl").read_text().splitlines()] for n in ("one", name)
    )
    assert [line["step"] for line in one] == [line["step"] for line in other] == [3, 6, 9, 12]
    for a, b in zip(one, other, strict=True):
        for key in ("loss", "l0", "l1", "l2/label", "l3", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), (a["step"], key)


@pytest.mark.slow
def test_shards_hold_what_one_process_holds(runs: Path) -> None:
    one, parts = (read_checkpoint(runs / name / "checkpoints" / "step-12") for name in ("one", "fsdp2"))
    assert parts.sharded and not one.sharded and parts.state["sharding"] == "fsdp2"
    for part in ("weights", "ema", "optimizer"):
        a, b = getattr(one, part), getattr(parts, part)
        assert {name: t.shape for name, t in a.items()} == {name: t.shape for name, t in b.items()}
    assert all((one.ema[name] - parts.ema[name]).abs().max() < 1e-4 for name in one.ema)
    sizes = [file.stat().st_size for file in parts.path.glob("shard-*.safetensors")]
    assert len(sizes) == 2 and max(sizes) < 0.7 * sum(sizes)  # neither process has written the whole


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["bit", "missing", "foreign"])
def test_damaged_shards_are_refused(runs: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(runs / "fsdp2" / "checkpoints" / "step-12", tmp_path / "step-12"))
    file = copy / "shard-00002-model-00001-of-00001.safetensors"
    if damage == "bit":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "missing":
        file.unlink()
    else:
        shutil.copy(file, copy / "shard-00003-model-00001-of-00001.safetensors")
    with pytest.raises(DamagedError, match="shard-0000"):
        read_checkpoint(copy)


@pytest.mark.parametrize("file", sorted(LAUNCH_FILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_launch_file_resolves(file: Path) -> None:
    """By accelerate's own parser, which refuses keys that it does not know."""
    parsed = load_config_from_file(str(file))
    kind = {"cpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}[file.stem]
    assert (str(parsed.distributed_type.value), parsed.num_machines) == (kind, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero2"])
def test_a_launch_file_starts_two_processes_that_share(
    tiny_file: Path, launch: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    if name == "deepspeed_zero2":
        pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH_FILES / f"{name}.yaml")]
    more = ["--num_processes=2", "--main_process_port=0", "-m", "mmdiff", "train", str(tiny_file)]
    answer = launch([*command, *more], tmp_path / "log", ACCELERATE_USE_CPU="1").wait()
    assert answer.code == 0, answer.err[-3000:]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-6" / "state.json").read_text())
    asked = {"fsdp2": "fsdp2", "deepspeed_zero2": "zero2"}[name]
    assert (state["processes"], state["sharding"], state["config"]["train"]["mixed_precision"]) == (2, asked, "bf16")


def agent(node: int, port: int, *command: str) -> list[str]:
    """torchrun on one of two machines, which meet at this one's loopback."""
    rendezvous = [f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_backend=c10d", "--rdzv_id=test"]
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *rendezvous]
    return [*start, f"--rdzv_conf=is_host={int(node == 0)}", "--local_addr=127.0.0.1", "-m", "mmdiff", *command]


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "alone"), [(0, True), (1, False)], ids=["agent", "machine"])
def test_a_lost_machine_ends_the_other_and_the_run_goes_on(
    tiny_file: Path, launch: Callable[..., Any], forked: Callable[..., Any], tmp_path: Path, lost: int, alone: bool
) -> None:
    """Of a machine's processes or of its agent alone, whose process must notice that, and end."""

    def settings(steps: int) -> list[str]:
        more = ["train.checkpoint_every=2", "train.resume=auto", "train.sharding=fsdp2", "train.log_every=1"]
        return [f"train.steps={steps}", "train.lr_scheduler_type=constant", *more]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = [agent(node, port, "train", str(tiny_file), *settings(100_000)) for node in (0, 1)]
    both = [launch(c, tmp_path / f"first{k}", ACCELERATE_USE_CPU="1") for k, c in enumerate(commands)]
    both[0].wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 4,')
    machine = psutil.Process(both[lost].process.pid)
    processes = [machine, *machine.children(recursive=True)]
    for process in processes[:1] if alone else processes:
        process.kill()
    killed = time.monotonic()
    answer = both[1 - lost].wait(60)
    gone = psutil.wait_procs(processes, timeout=max(0, killed + 60 - time.monotonic()))[1] == []
    assert answer.code != 0 and gone
    logs = [log for k in (0, 1) for log in sorted((tmp_path / f"first{k}").glob("std*.txt"))]
    said = [line for log in logs for line in log.read_text().splitlines()]
    lines = [line for line in said if "train.resume=auto" in line]
    assert lines and all(line.startswith(("mmdiff: ", "stopped at step ")) for line in lines), lines
    assert alone or len(lines) == 1
    done = max(int(path.name.split("-")[1]) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    again = forked(["train", tiny_file, *settings(done + 2)], tmp_path / "second", processes=2).wait()
    assert again.code == 0, again.err
    assert (tmp_path / "run" / "checkpoints" / f"step-{done + 2}").is_dir()


@pytest.mark.parametrize(
    ("override", "key"), [("train.mixed_precision=fp16", "train.mixed_precision"), ("train.sharding=zero3", "train.")]
)
def test_what_cannot_be_shared_is_refused(configure: Callable[..., Config], override: str, key: str) -> None:
    from accelerate import Accelerator

    from mmdiff.training.sharded import FullySharded

    with pytest.raises(InputError, match=f"^{key}"):
        config = configure("train.sharding=fsdp2", override)
        FullySharded(Accelerator(cpu=True), config.train)
        train(config)
