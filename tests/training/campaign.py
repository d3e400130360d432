"""Kill, starve and damage trainings, and count what is lost: `python tests/training/campaign.py CONFIG [KEY=VALUE …]`.

Every training is one forked process, or several. One of them is killed at a random moment or at the n-th file that it
brings to the disk; the others must end by themselves. The run goes on, and is compared with one that nobody disturbed.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mmdiff.config import Config, load_config
from mmdiff.errors import InputError, TrainingError
from mmdiff.training import disk, train

SETTINGS = ["train.checkpoint_every=2", "train.resume=auto", "evaluate.at_end=false"]
PATIENCE = 60.0  # seconds within which a process ends when another one of its run was killed


def flip(file: Path) -> None:
    """One bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES: list[Callable[[Path], object]] = [
    flip,
    lambda file: file.unlink(),
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
]


def forked(
    config: Config,
    prepare: Callable[[], object] = lambda: None,
    delay: float | None = None,
    processes: int = 1,
    victim: int = 0,
) -> str:
    """Train in children: "done", "clear" (one line), "killed", "traceback", or "hung" (until it was ended).

    Args:
        config: of the run.
        prepare: is called in the first process.
        delay: seconds until one is killed.
        processes: of the run, on gloo.
        victim: the process that is killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_child(config, prepare if k == 0 else lambda: None, k, processes, port) for k in range(processes)]
    if delay is not None:
        time.sleep(delay)
        os.kill(children[victim], signal.SIGKILL)
    outcomes = _outcomes(children)
    worst = ("hung", "traceback", "killed", "clear", "done")
    return min(outcomes, key=worst.index)


def _child(config: Config, prepare: Callable[[], object], rank: int, processes: int, port: int) -> int:
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = Path(os.environ.get("CAMPAIGN_LOG", os.devnull)).open("a")  # noqa: SIM115 os._exit
        if processes > 1:
            world = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {name: str(value) for name, value in (world | {"MASTER_PORT": port}).items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "1"}
        try:
            prepare()
            train(config, progress=False)
            os._exit(0)
        except (InputError, TrainingError) as error:
            print(rank, error, flush=True)
            os._exit(1)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(3)
    return child


def _outcomes(children: list[int]) -> list[str]:
    """How each ended; once one was killed, the others have `PATIENCE`."""
    ended: dict[int, str] = {}
    deadline = math.inf
    while len(ended) < len(children):
        for child in set(children) - set(ended):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                ended[child] = "hung"
                continue
            number, status = os.waitpid(child, os.WNOHANG)
            if number:
                killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
                codes = {0: "done", 1: "clear"}
                ended[child] = "killed" if killed else codes.get(os.waitstatus_to_exitcode(status), "traceback")
                if ended[child] != "done":
                    deadline = min(deadline, time.monotonic() + PATIENCE)
        time.sleep(0.02)
    return list(ended.values())


def kill_at(number: int) -> Callable[[], None]:
    """A kill at the n-th file or folder that is brought to the disk."""

    def prepare() -> None:
        sync, calls = disk.sync, iter(range(number, -1, -1))

        def counted(path: Path) -> None:
            if next(calls) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(path)

        disk.sync = counted

    return prepare


def bits(run: Path) -> dict[str, bytes]:
    """The last checkpoint's tensors and the pipeline's weights."""
    last = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    files = [*last.glob("*.safetensors"), *(run / "pipeline").rglob("*.safetensors")]
    tensors = {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def differing(run: Path, wanted: dict[str, bytes]) -> int:
    """How many bits of the last checkpoint and the pipeline are others; all of a file that has another size."""
    found = bits(run)
    pairs = [(found.get(name, b""), wanted.get(name, b"")) for name in found.keys() | wanted.keys()]
    whole = (int.from_bytes(a) ^ int.from_bytes(b) if len(a) == len(b) else (1 << 8 * len(b)) - 1 for a, b in pairs)
    return sum(number.bit_count() for number in whole)


def campaign(
    config_file: Path,
    folder: Path,
    kills: int,
    full: int,
    damaged: int,
    seed: int = 0,
    overrides: Sequence[str] = (),
    processes: int = 1,
) -> Counter:
    """Counts of {kind, outcome}; "traceback", "hung", "differs" (in bits) and "foreign" must stay 0.

    Args:
        config_file: of any experiment.
        folder: for the runs.
        kills, full, damaged: how many runs are killed, run out of disk, and have a checkpoint damaged.
        seed: of the moments.
        overrides: of the config.
        processes: of every run.
    """
    draw, found = random.Random(seed), Counter()

    def config(run: Path) -> Config:
        return load_config(config_file, [*SETTINGS, *overrides, f"output={run}"])

    def trained(run: Path, *how: Any) -> str:
        return forked(config(run), *(how or (lambda: None, None)), processes, draw.randrange(processes))

    whole = folder / "whole"
    started = time.perf_counter()
    assert trained(whole) == "done"
    seconds, wanted = time.perf_counter() - started, bits(whole)

    def compare(kind: str, run: Path) -> None:
        foreign = run / "checkpoints" / "step-1-mine"
        outcome = trained(run)
        found[kind, "resumed" if outcome == "done" else outcome] += 1
        found[kind, "differs"] += differing(run, wanted) if outcome == "done" else 0
        found[kind, "foreign"] += foreign.exists() and foreign.read_text() != "mine"
        shutil.rmtree(run)

    for number in range(kills):
        run = folder / "killed"
        random_moment = number % 2 == 0
        delay = draw.uniform(0.2, 1.0) * seconds if random_moment else None
        outcome = trained(run, (lambda: None) if random_moment else kill_at(number), delay)
        found["kill", outcome] += 1
        if (run / "checkpoints").is_dir():
            (run / "checkpoints" / "step-1-mine").write_text("mine")
        compare("kill", run)
    for _ in range(damaged):
        run = folder / "damaged"
        shutil.copytree(whole, run)
        last = max((run / "checkpoints").glob("step-*"), key=lambda p: int(p.name.split("-")[1]))
        draw.choice(DAMAGES)(draw.choice(sorted(last.iterdir())))
        compare("damage", run)
    for _ in range(full):
        _full_disk(folder / "disk", config, found, wanted, draw, sum(map(len, wanted.values())))
    return found


def _full_disk(
    disk_: Path, config: Callable[[Path], Config], found: Counter, wanted: dict, draw: random.Random, size: int
) -> None:
    """A file system that is full at a random place of the run, and then is not."""
    disk_.mkdir(exist_ok=True)
    room = 64 * 2**20
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk_], check=True)
    try:
        (disk_ / "filler").write_bytes(bytes(room - draw.randint(20_000, 2 * size)))
        found["full disk", forked(config(disk_ / "run"))] += 1
        (disk_ / "filler").unlink()
        outcome = forked(config(disk_ / "run"))
        found["full disk", "resumed" if outcome == "done" else outcome] += 1
        found["full disk", "differs"] += differing(disk_ / "run", wanted) if outcome == "done" else 0
    finally:
        subprocess.run(["umount", "-l", disk_], check=True)


def main(*arguments: str) -> None:
    """A line per kind and outcome."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of the config")
    for name, default in (("kills", 34), ("full", 14), ("damaged", 20), ("seed", 0), ("processes", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_intermixed_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        numbers = asked.kills, asked.full, asked.damaged, asked.seed
        counts = campaign(asked.config, Path(scratch), *numbers, asked.overrides, asked.processes)
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:10} {outcome:10} {count}")


if __name__ == "__main__":
    main(*sys.argv[1:])
