"""Folders of tensors that say of themselves whether they are whole: state.json holds a hash of every other file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

STATE = "state.json"
_LARGEST_STATE = 16 * 2**20  # bytes


class DamagedError(Exception):
    """A folder cannot be used; the message says why."""


def seal(folder: Path, state: dict[str, Any]) -> None:
    """Write state.json: the state, the hash of every safetensors file, and its own."""
    files = {file.name: _file_hash(file) for file in sorted(folder.glob("*.safetensors"))}
    state = {**state, "files": files}
    (folder / STATE).write_text(json.dumps({**state, "sha256": _state_hash(state)}, indent=1) + "\n")


def read_state(folder: Path) -> dict[str, Any]:
    """state.json, without its own hash.

    Raises:
        DamagedError: saying what is wrong with it.
    """
    file = folder / STATE
    check_plain(file)
    if file.stat().st_size > _LARGEST_STATE:
        raise DamagedError(f"{STATE} has {file.stat().st_size} bytes")
    try:
        state = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise DamagedError(f"{STATE} is no JSON") from None
    if not isinstance(state, dict) or not isinstance(state.get("files"), dict):
        raise DamagedError(f"{STATE} names no hashes")
    if state.pop("sha256", None) != _state_hash(state):
        raise DamagedError(f"{STATE} does not have its own hash")
    return state


def check_hash(file: Path, state: dict[str, Any]) -> None:
    """A file must be the one that was sealed.

    Raises:
        DamagedError: it is not.
    """
    check_plain(file)
    if _file_hash(file) != state["files"].get(file.name):
        raise DamagedError(f"{file.name} does not have the hash that {STATE} names")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        DamagedError: it cannot be read.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{file.name} cannot be read, {error}") from None


def check_plain(file: Path) -> None:
    """Refuse what is no file, and links.

    Raises:
        DamagedError: naming it.
    """
    if file.is_symlink() or not file.is_file():
        raise DamagedError(f"{file.name} {'is a link' if file.is_symlink() else 'is missing'}")


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_hash(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
