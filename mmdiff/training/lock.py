"""One training per run folder: a file that names process, host and start, and goes when the training ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from mmdiff.errors import InputError, at

NAME = "train.lock"


@contextlib.contextmanager
def locked(folder: Path, name: str = NAME, key: str = "output") -> Iterator[None]:
    """Hold the folder's lock within the block.

    Args:
        folder: that exists.
        name: of the lock's file.
        key: for the error.

    Raises:
        InputError: another process holds it, by process and host.
    """
    path = folder / name
    own = _record(folder)
    if not _created(path, own):
        with at(key, join=None):
            _clear_stale(path, folder)
            if not _created(path, own):  # another one was faster
                raise _refusal(path, _read(path))
    try:
        yield
    finally:
        if _read(path) == own:
            path.unlink(missing_ok=True)


def _record(folder: Path) -> dict[str, Any]:
    """This process; a copy of the folder has another inode, and its lock holds nothing."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "started": _started(os.getpid()),
        "folder": folder.stat().st_ino,
    }


def _started(pid: int) -> float | None:
    """Seconds from the machine's start to a process's, which clock changes leave alone; None of one that is gone."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return round(process.create_time() - psutil.boot_time(), 2)
    except (psutil.Error, ValueError, OverflowError):
        return None


def _created(path: Path, record: dict[str, Any]) -> bool:
    """Whether the lock was free; it is written then."""
    try:
        with path.open("x") as file:
            file.write(json.dumps(record) + "\n")
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _read(path: Path) -> dict[str, Any]:
    """What a lock says; nothing where it cannot be read."""
    for _ in range(2):
        try:
            record = json.loads(path.read_text())
            return record if isinstance(record, dict) else {}
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):
            time.sleep(0.1)  # it may just be written
    return {}


def _clear_stale(path: Path, folder: Path) -> None:
    """Take away the lock of a process that is gone, and no other."""
    record = _read(path)
    if _holds(record, folder):
        raise _refusal(path, record)
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):  # another one was faster
        path.rename(aside)
        if _holds(_read(aside), folder):  # it was taken in between
            aside.rename(path)
        aside.unlink(missing_ok=True)


def _holds(record: dict[str, Any], folder: Path) -> bool:
    """Whether a lock's process may still train here; of another host nobody knows."""
    pid = record.get("pid")
    if not isinstance(pid, int) or record.get("folder") != folder.stat().st_ino:
        return False
    if record.get("host") != socket.gethostname():
        return True
    started = _started(pid)
    return started is not None and started == record.get("started")


def _refusal(path: Path, record: dict[str, Any]) -> InputError:
    who = f"process {record.get('pid')} on {record.get('host')} writes here since {record.get('since')}"
    remedy = f"wait for its end or stop it; where it is gone, delete {path}"
    return InputError("output", str(path.parent), f"{who}; {remedy}")
