"""Kill, starve and damage trainings, and count what is lost: `python tests/training/campaign.py CONFIG FOLDER`.

Every training is a forked process. It is killed at a random moment or at the n-th file that it brings to the disk,
continued, and compared with one that nobody disturbed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
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


def campaign(config_file: Path, folder: Path, kills: int, full: int, damaged: int, seed: int = 0) -> Counter:
    """Counts of {kind, outcome}; "differs" and "foreign" must stay 0."""
    draw, found = random.Random(seed), Counter()

    def config(run: Path) -> Config:
        return load_config(config_file, [f"output={run}", *SETTINGS])

    whole = folder / "whole"
    started = time.perf_counter()
    assert forked(config(whole)) == "done"
    seconds, wanted = time.perf_counter() - started, bits(whole)

    def compare(kind: str, run: Path) -> None:
        foreign = run / "checkpoints" / "step-1-mine"
        outcome = forked(config(run))
        found[kind, "resumed" if outcome == "done" else outcome] += 1
        found[kind, "differs"] += outcome == "done" and bits(run) != wanted
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
        found["full disk", "differs"] += outcome == "done" and bits(disk_ / "run") != wanted
    finally:
        subprocess.run(["umount", "-l", disk_], check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        counts = campaign(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else scratch), 34, 14, 20)
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:10} {outcome:10} {count}")
