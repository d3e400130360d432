"""Files that stand whole or not at all under their names, and what a disk may refuse, said in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from mmdiff.errors import TrainingError

PARTIAL = ".partial-"
_REMEDIES = {
    errno.ENOSPC: "the disk is full; make room",
    errno.EDQUOT: "the quota is used up; make room",
    errno.EFBIG: "the file is larger than the limit of this process; raise it (ulimit -f)",
    errno.EROFS: "the file system is read-only; mount it writable, or choose another {output}",
    errno.EACCES: "there is no permission to write; grant it, or choose another {output}",
    errno.EPERM: "there is no permission to write; grant it, or choose another {output}",
}
_CODE = re.compile(r"\(os error (\d+)\)")  # of safetensors, which raises no OSError
_PEER = re.compile(r"gloo|NCCL|ProcessGroup|[Cc]onnection (was )?(closed|reset)|Broken pipe", re.IGNORECASE)
_WORKER = re.compile(r"DataLoader worker .*(exited unexpectedly|is killed by signal)")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write a file or a folder to; it becomes ``path`` at the end of the block, or goes.

    What a folder that stood there holds beside the new files stays.

    Args:
        path: the final name, in a folder that exists.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}")
    remove(partial)
    try:
        yield partial
        settle(partial)
        if partial.is_dir() and path.is_dir() and not path.is_symlink():
            _merge(partial, path)
        else:
            partial.replace(path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(partial)
        raise


def settle(path: Path) -> None:
    """Bring a file or a folder with all its files to the disk, readable as the umask says."""
    if path.is_dir():
        mode = path.stat().st_mode & 0o666  # safetensors writes files that their owner alone can read
        for inner in path.iterdir():
            if not inner.is_dir():
                inner.chmod(mode)
            settle(inner)
    sync(path)


def sync(path: Path) -> None:
    """fsync of a file, or of a folder where the file system knows that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder; a folder loses its name first, so that half of it never stands there."""
    if path.is_dir() and not path.is_symlink():
        if not path.name.startswith(PARTIAL):
            aside = path.with_name(f"{PARTIAL}{path.name}")
            remove(aside)
            path = path.rename(aside)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _merge(partial: Path, folder: Path) -> None:
    """Move the files of one folder into another, each in one piece."""
    for inner in sorted(partial.iterdir()):
        target = folder / inner.name
        if inner.is_dir() and target.is_dir():
            _merge(inner, target)
        else:
            inner.replace(target)
    partial.rmdir()
    sync(folder)


@contextlib.contextmanager
def faults(folder: Path, then: str = "train.resume=auto continues", output: str = "output=…") -> Iterator[None]:
    """What the disk or the machine refuses within the block is a `TrainingError` that names the path and the remedy.

    Args:
        folder: named where the error names no file.
        then: how the work goes on.
        output: what names another folder.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        said = _said(error, folder, then, output)
        if said is None:
            raise
        raise TrainingError(said, everywhere=isinstance(error, OSError | SafetensorError)) from error


def _said(error: Exception, folder: Path, then: str, output: str) -> str | None:
    """The line for an error of the machine; None for any other."""
    match = _WORKER.search(str(error))
    if isinstance(error, RuntimeError) and match:
        why = "a process that reads data was killed, mostly because memory ran out; lower data.workers or the batch"
        return f"{folder}: {why}; {then} ({' '.join(match.group().split())})"
    if isinstance(error, RuntimeError) and "WORLD_SIZE" in os.environ and _PEER.search(str(error)):
        return f"another process of this run is gone; its own line says why; {then} ({folder})"
    if isinstance(error, SafetensorError):
        code = _CODE.search(str(error))
        error = OSError(int(code.group(1)), os.strerror(int(code.group(1)))) if code else error
    if not isinstance(error, OSError) or error.errno is None:
        return None
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else folder
    path = path.with_name(path.name.removeprefix(PARTIAL))
    why = _REMEDIES.get(error.errno, f"{error.strerror}; mend it, or choose another {{output}}").format(output=output)
    return f"{path}: {why}; {then}"
