"""Shared by all tests: a tiny experiment, one finished run of it, the command line in this process, and real processes.

Nothing here stands in for the package's own code.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # all of this before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
if "HF_DATASETS_CACHE" not in os.environ:  # what the tests' own parquet files turn into
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="mmdiff-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
_LAUNCHER = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
for _name in _LAUNCHER:
    os.environ.pop(_name, None)

import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from networks import random_model  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from processes import Forked, end_with_the_tests, mmdiff  # noqa: E402

from mmdiff.config import Config, load_config  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
Tree = dict[str, Any]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("data") and not SHARED.is_dir():
        pytest.skip("needs ../shared")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _settings_of_the_process() -> Iterator[None]:
    """Threads and signal handlers belong to the process; a test that trains changes them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    torch.set_num_threads(1)
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------- a tiny experiment


def tiny_tree(output: Path) -> Tree:
    """Digits at toy size: about 25 steps per second on one slow core."""
    return {
        "name": "tiny",
        "output": str(output),
        "data": {"source": "digits", "cache_mib": 0},  # opening costs more than a few steps
        "modalities": {"image": {"kind": "image"}, "label": {"kind": "label"}},
        "backbone": {
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "patch_size": 2,
            "norm_num_groups": 4,
            "attention_head_dim": 8,
        },
        "scheduler": {"num_train_timesteps": 50},
        "train": {"steps": 6, "batch_size": 12, "warmup": 2, "threads": 1, "log_every": 3},
        "sample": {"steps": 2},
        "evaluate": {"at_end": False, "num_samples": 40},
    }


@pytest.fixture
def tiny(tmp_path: Path) -> Tree:
    """The tree of a tiny experiment that runs in `tmp_path / "run"`; yours to change."""
    return tiny_tree(tmp_path / "run")


@pytest.fixture
def tiny_file(tiny: Tree, tmp_path: Path) -> Path:
    """The tiny experiment as a YAML file."""
    path = tmp_path / "tiny.yaml"
    OmegaConf.save(OmegaConf.create(tiny), path)
    return path


@pytest.fixture
def configure(tiny_file: Path) -> Callable[..., Config]:
    """`configure("train.steps=3", …)`: the tiny experiment with overrides."""
    return lambda *overrides: load_config(tiny_file, list(overrides))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run: 12 steps, checkpoints at 4, 8 and 12 of which two stay. Read only; copy it."""
    from mmdiff.training import train

    folder = tmp_path_factory.mktemp("finished")
    OmegaConf.save(OmegaConf.create(tiny_tree(folder / "run")), folder / "tiny.yaml")
    overrides = [
        "train.steps=12",
        "train.optimizer=muon",
        "train.log_every=5",
        "train.checkpoint_every=4",
        "train.sample_every=6",
    ]
    return train(load_config(folder / "tiny.yaml", overrides))


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, yours to change."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


# ------------------------------------------------------------------------------------- every kind of modality at once


@pytest.fixture(scope="session")
def all_kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained pipeline of 8x8 RGB images, masks, masked images, labels, vectors and depth maps."""
    from mmdiff.pipeline import MTDiffusionPipeline
    from mmdiff.schedulers import MTDiffusionScheduler

    weight = {"schedule": "bump", "scale": 0.5}
    with torch.random.fork_rng(devices=[]):
        model = random_model(
            {
                "image": {"kind": "image", "channels": 3, "size": 8},
                "mask": {"kind": "mask", "num_classes": 4, "size": 8},
                "masked_image": {"kind": "masked_image", "channels": 3, "size": 8},
                "label": {"kind": "label", "num_classes": 3, "names": ["circle", "square", "triangle"]},
                "embedding": {"kind": "embedding", "dim": 5, "log_norm_mean": 1.0, "log_norm_std": 0.2},
                "depth": {"kind": "dense", "channels": 1, "size": 8, "mean": 5.0, "std": 2.0},
            }
        )
    scheduler = MTDiffusionScheduler(
        num_train_timesteps=20,
        solver="DPMSolverMultistepScheduler",
        weights=dict.fromkeys(("mask", "label", "embedding", "depth"), weight),
    )
    folder = tmp_path_factory.mktemp("all-kinds")
    MTDiffusionPipeline(model=model, scheduler=scheduler).save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------- the command line here


class Answer(NamedTuple):
    """What a command line gave."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on stderr, without the program's name; anything else on stderr fails."""
        assert self.err.startswith("mmdiff: "), self.err
        assert self.err.count("\n") == 1 and self.err.endswith("\n"), self.err
        return self.err.removeprefix("mmdiff: ").rstrip()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`cli("train", path, "train.steps=3")` calls the entry point in this process."""
    from mmdiff.cli.app import main

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["mmdiff", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        return Answer(code, *capsys.readouterr())

    return call


# ---------------------------------------------------------------------------------------------------- real processes


class Launched:
    """A real process and everything it starts.

    Args:
        arguments: of the command line.
        folder: for stdout and stderr, and the working directory.
        environment: on top of the tests' own.
    """

    def __init__(self, arguments: list[str], folder: Path, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout.txt", folder / "stderr.txt"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                arguments,
                stdout=out,
                stderr=err,
                cwd=folder,
                env={**os.environ, **environment},
                start_new_session=True,
                preexec_fn=end_with_the_tests,
            )

    def wait(self, timeout: float = 180) -> Answer:
        """Until it ends."""
        return Answer(self.process.wait(timeout), self._out.read_text(), self._err.read_text())

    def wait_for(self, file: Path, text: str, timeout: float = 180) -> None:
        """Until a file holds a text, looking every 10 ms."""
        deadline = time.monotonic() + timeout
        while not (file.is_file() and text in file.read_text()):
            assert self.process.poll() is None and time.monotonic() < deadline, self._err.read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL to it and to all its descendants (torchrun's workers have sessions of their own)."""
        if self.process.poll() is None:
            started = psutil.Process(self.process.pid)
            for process in [started, *started.children(recursive=True)]:
                process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def launch() -> Iterator[Callable[..., Launched]]:
    """`launch([…], folder, KEY="value")` starts a process; what still runs at the end is killed."""
    started: list[Launched] = []

    def start(arguments: list[str], folder: Path, **environment: str) -> Launched:
        started.append(Launched(arguments, folder, **environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="session")
def forked() -> Iterator[Callable[..., Forked]]:
    """`forked(["train", …], folder, processes=2)` is `mmdiff train …` in processes that need not import it."""
    started: list[Forked] = []

    def start(arguments: list[str], folder: Path, processes: int = 1) -> Forked:
        started.append(Forked(mmdiff, tuple(map(str, arguments)), folder, processes))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SqueezeNet 1.1 with torchvision's names: LPIPS needs nothing else."""
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mine.pth"
    torch.save(squeezenet1_1(weights=None).state_dict(), path)
    return path
