"""Processes of the command line, forked from one that has imported it all: imports cost more than a tiny training.

And what two runs whose batches were split otherwise have in common.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mmdiff.training.tracking import MACHINE

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mmdiff.training", "mmdiff.cli.app", "matplotlib.pyplot", "sklearn.datasets"])


class Ended(NamedTuple):
    """The worst exit code, and what all processes wrote."""

    code: int
    out: str
    err: str


class Forked:
    """One process, or several of one run on gloo, each with the variables that torchrun would set.

    Args:
        function: is called with the arguments in every process; of a module that can be imported.
        arguments: of the function.
        folder: for stdout and stderr, and the working directory.
        processes: how many.
        environment: on top of the tests' own.
    """

    def __init__(
        self, function: Callable[..., object], arguments: tuple, folder: Path, processes: int = 1, **environment: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._folder, self.processes = folder, []
        for rank in range(processes):
            world = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes}
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables = {**os.environ, **environment, "ACCELERATE_USE_CPU": "1"}
            variables |= {name: str(value) for name, value in world.items()} if processes > 1 else {}
            work = (function, arguments, folder, rank, variables, multiprocessing.get_start_method())
            process = CONTEXT.Process(target=_run, args=work)
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 180) -> Ended:
        """Until all have ended."""
        for process in self.processes:
            process.join(timeout)
        codes = [-signal.SIGKILL if process.exitcode is None else process.exitcode for process in self.processes]
        self.kill()
        return Ended(next((code for code in codes if code), 0), *self._texts())

    def _texts(self) -> list[str]:
        paths = [sorted(self._folder.glob(f"*.{end}")) for end in ("out", "err")]
        return ["".join(path.read_text() for path in own) for own in paths]

    def wait_for(self, file: Path, text: str, timeout: float = 180) -> None:
        """Until a file holds a text, looking every 10 ms."""
        deadline = time.monotonic() + timeout
        while not (file.is_file() and text in file.read_text()):
            assert all(process.is_alive() for process in self.processes) and time.monotonic() < deadline, self._texts()
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL to what still runs."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()


def end_with_the_tests() -> None:
    """SIGTERM when the parent is gone, killed too: endless trainings must not outlive it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def mmdiff(*arguments: str) -> None:
    """`mmdiff ARGUMENTS` in this process."""
    from mmdiff.cli.app import main

    sys.argv = ["mmdiff", *arguments]
    main()


def _run(
    function: Callable[..., object],
    arguments: tuple,
    folder: Path,
    rank: int,
    variables: dict[str, Any],
    start_method: str,
) -> None:
    end_with_the_tests()
    multiprocessing.set_start_method(start_method, force=True)  # of data workers: the tests' own
    for number, end in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{rank}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ |= variables
    os.chdir(folder)
    function(*arguments)


# ------------------------------------------------------------------------------------------------------- what they left


def lines(folder: Path, count: int) -> list[dict[str, float]]:
    """The first lines of a run, without what measures the machine."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MACHINE} for line in read[:count]]


def assert_close(one: Path, other: Path) -> None:
    """The lines of the first six steps, before rounding has grown."""
    for a, b in zip(lines(one, 2), lines(other, 2), strict=True):
        assert a["step"] in (3, 6)
        assert a == pytest.approx(b, rel=1e-4, abs=1e-7)
