"""Kill, starve and damage trainings, and count what is lost: `python tests/training/campaign.py CONFIG [KEY=VALUE …]`.

Every training is a forked process. It is killed at a random moment or at the n-th file that it brings to the disk,
continued, and compared with one that nobody disturbed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from mmdiff.config import Config, load_config
from mmdiff.errors import InputError, TrainingError
from mmdiff.training import disk, train

SETTINGS = ["train.checkpoint_every=2", "train.resume=auto", "evaluate.at_end=false"]
PARTS = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "window.safetensors", "state.json")


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


def forked(config: Config, prepare: Callable[[], object] = lambda: None, delay: float | None = None) -> str:
    """Train in a child: "done", "clear" (one line), "killed" or "traceback"."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 the child ends with os._exit
        try:
            prepare()
            train(config, progress=False)
            os._exit(0)
        except (InputError, TrainingError):
            os._exit(1)
        except BaseException:
            os._exit(3)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "killed"
    return {0: "done", 1: "clear"}.get(os.WEXITSTATUS(status), "traceback")


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
    files = [last / name for name in PARTS[:4]] + sorted((run / "pipeline").rglob("*.safetensors"))
    return {file.name: file.read_bytes() for file in files}


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
) -> Counter:
    """Counts of {kind, outcome}; "traceback", "differs" (in bits) and "foreign" must stay 0.

    Args:
        config_file: of any experiment.
        folder: for the runs.
        kills, full, damaged: how many runs are killed, run out of disk, and have a checkpoint damaged.
        seed: of the moments.
        overrides: of the config.
    """
    draw, found = random.Random(seed), Counter()

    def config(run: Path) -> Config:
        return load_config(config_file, [*SETTINGS, *overrides, f"output={run}"])

    whole = folder / "whole"
    started = time.perf_counter()
    assert forked(config(whole)) == "done"
    seconds, wanted = time.perf_counter() - started, bits(whole)

    def compare(kind: str, run: Path) -> None:
        foreign = run / "checkpoints" / "step-1-mine"
        outcome = forked(config(run))
        found[kind, "resumed" if outcome == "done" else outcome] += 1
        found[kind, "differs"] += differing(run, wanted) if outcome == "done" else 0
        found[kind, "foreign"] += foreign.exists() and foreign.read_text() != "mine"
        shutil.rmtree(run)

    for number in range(kills):
        run = folder / "killed"
        random_moment = number % 2 == 0
        delay = draw.uniform(0.2, 1.0) * seconds if random_moment else None
        outcome = forked(config(run), (lambda: None) if random_moment else kill_at(number), delay)
        found["kill", outcome] += 1
        if (run / "checkpoints").is_dir():
            (run / "checkpoints" / "step-1-mine").write_text("mine")
        compare("kill", run)
    for _ in range(damaged):
        run = folder / "damaged"
        shutil.copytree(whole, run)
        file = max((run / "checkpoints").glob("step-*"), key=lambda p: int(p.name.split("-")[1])) / draw.choice(PARTS)
        draw.choice(DAMAGES)(file)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of the config")
    for name, default in (("kills", 34), ("full", 14), ("damaged", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as scratch:
        counts = campaign(
            asked.config, Path(scratch), asked.kills, asked.full, asked.damaged, asked.seed, asked.overrides
        )
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:10} {outcome:10} {count}")
