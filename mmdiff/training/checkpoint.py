"""Checkpoints as safetensors + JSON: written whole or not at all, checked by hash, rotated, read back bit by bit."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdiff.errors import InputError, TrainingError
from mmdiff.training.disk import PARTIAL, remove, whole
from mmdiff.trust import check_links

STATE, PARTS = "state.json", ("weights", "ema", "optimizer", "window")
_OURS = re.compile(r"step-(0|[1-9][0-9]*)")  # nothing else in the folder is read or deleted
_LARGEST_STATE = 16 * 2**20  # bytes


class Checkpoint(NamedTuple):
    """What a checkpoint holds: ``state`` of state.json, and the tensors of its four files."""

    path: Path
    state: dict[str, Any]
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    window: Tensor


class DamagedError(Exception):
    """A checkpoint cannot be used; the message says why."""


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under "<parameter index>.<key>"."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# ----------------------------------------------------------------------------------------------------------- the folder


def checkpoints(folder: Path) -> list[Path]:
    """Folders named `step-<digits>`, oldest first; nothing else is ours."""
    if not folder.is_dir():
        return []
    paths = (path for path in folder.iterdir() if _OURS.fullmatch(path.name))
    return sorted((path for path in paths if path.is_dir() and not path.is_symlink()), key=step_of)


def step_of(path: Path) -> int:
    """The steps that a checkpoint has taken, by its name."""
    return int(path.name.removeprefix("step-"))


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written, or half-deleted."""
    for path in folder.iterdir():
        if path.name.startswith(PARTIAL) and _OURS.fullmatch(path.name.removeprefix(PARTIAL)):
            remove(path)


def check_names_are_free(folder: Path) -> None:
    """Refuse a file or a link where a checkpoint may have to stand.

    Raises:
        InputError: naming it.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if _OURS.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
            raise InputError("output", str(path), "is no checkpoint, but has the name of one; move it away")


# -------------------------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    folder: Path,
    step: int,
    module: nn.Module,
    averages: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    window: Tensor,
    facts: dict[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-N` whole or not at all and remove the oldest beyond ``keep``.

    Args:
        folder: `checkpoints/` of the run.
        step: steps taken.
        module, averages, optimizer: the state.
        window: terms of the steps since the last line of metrics, (n, terms).
        facts: what else must be known to continue: threads, processes, scaler, data, config.
        keep: how many checkpoints stay.

    Raises:
        TrainingError: an average is not finite.
    """
    check_averages(averages, step)
    final = folder / f"step-{step}"
    parts = (module.state_dict(), averages, optimizer_tensors(optimizer), {"terms": window})
    if final.exists():  # damaged: a run never takes a step twice otherwise
        remove(final)
    with whole(final) as partial:
        partial.mkdir()
        for name, tensors in zip(PARTS, parts, strict=True):
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(plain, partial / f"{name}.safetensors")
        seal(partial, {"step": step, **facts})
    for old in [path for path in checkpoints(folder) if step_of(path) <= step][:-keep]:
        remove(old)
    return final


def check_averages(averages: dict[str, Tensor], step: int) -> None:
    """Averages that are not finite are never saved.

    Raises:
        TrainingError: naming the first of them.
    """
    finite = torch.stack([average.isfinite().all() for average in averages.values()]).tolist()
    for name, fine in zip(averages, finite, strict=True):
        if not fine:
            raise TrainingError(
                f"step {step}: the average of {name} is not finite; nothing was saved; lower train.learning_rate"
            )


def seal(folder: Path, state: dict[str, Any]) -> None:
    """Write state.json: the state, the hash of every other file, and its own."""
    state = {**state, "files": {f"{name}.safetensors": _file_hash(folder / f"{name}.safetensors") for name in PARTS}}
    (folder / STATE).write_text(json.dumps({**state, "sha256": _state_hash(state)}, indent=1) + "\n")


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_hash(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------------- reading


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and check every hash.

    Raises:
        DamagedError: saying what is wrong with which file.
    """
    state = _read_state(path)
    tensors = []
    for name in PARTS:
        file = path / f"{name}.safetensors"
        _check_plain(file)
        if _file_hash(file) != state["files"].get(file.name):
            raise DamagedError(f"{file.name} does not have the hash that {STATE} names")
        try:
            tensors.append(load_file(file))
        except (SafetensorError, OSError) as error:
            raise DamagedError(f"{file.name} cannot be read, {error}") from None
    weights, ema, optimizer, window = tensors
    return Checkpoint(path, state, weights, ema, optimizer, window["terms"])


def _read_state(path: Path) -> dict[str, Any]:
    file = path / STATE
    _check_plain(file)
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
    if _OURS.fullmatch(path.name) and state.get("step") != step_of(path):
        raise DamagedError(f"{STATE} is that of step {state.get('step')}")
    return state


def _check_plain(file: Path) -> None:
    if file.is_symlink() or not file.is_file():
        raise DamagedError(f"{file.name} {'is a link' if file.is_symlink() else 'is missing'}")


def newest(folder: Path, say: Any) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    Args:
        folder: `checkpoints/` of a run.
        say: is given a line for each damaged one.

    Raises:
        InputError: all of them are damaged.
    """
    damaged = []
    for path in reversed(checkpoints(folder)):
        try:
            checkpoint = read_checkpoint(path)
        except DamagedError as error:
            damaged.append(f"{path.name} ({error})")
        else:
            for line in damaged:
                say(f"{folder}: {line} is damaged; {path.name} is used instead")
            return checkpoint
    if damaged:
        remedy = "restore one of them, or remove them all to begin anew"
        raise InputError("train.resume", str(folder), f"every checkpoint is damaged: {', '.join(damaged)}; {remedy}")
    return None


def find_checkpoint(path: Path, key: str, say: Any) -> Checkpoint:
    """The checkpoint that a folder is, or the newest one of a run folder.

    Args:
        path: of a run or a checkpoint.
        key: the config key that names it.
        say: is given a line for each damaged one.

    Raises:
        InputError: there is none.
    """
    path = path.expanduser()
    if path.is_dir():
        check_links(key, path)
    if not path.is_dir():
        raise InputError(key, str(path), "is no folder; name a run or a checkpoint (or: never, auto)")
    if (path / STATE).exists() or (path / "weights.safetensors").exists():
        try:
            return read_checkpoint(path)
        except DamagedError as error:
            raise InputError(key, str(path), f"is damaged: {error}; name another checkpoint") from None
    checkpoint = newest(path / "checkpoints", say)
    if checkpoint is None:
        raise InputError(key, str(path), "holds no checkpoint; name a run folder or one of its checkpoints/step-N")
    return checkpoint


def load_checkpoint(checkpoint: Checkpoint, module: nn.Module, averages: Any, optimizer: torch.optim.Optimizer) -> None:
    """Restore what a checkpoint holds.

    Raises:
        InputError: when it does not fit the module.
    """
    own = module.state_dict()
    trained = {name: own[name] for name, _ in module.named_parameters()}
    check_fits(checkpoint.path, own, checkpoint.weights)
    check_fits(checkpoint.path, trained, checkpoint.ema)
    module.load_state_dict(checkpoint.weights)
    averages.load(checkpoint.ema)
    load_optimizer(optimizer, checkpoint.optimizer)


def check_fits(path: Path, own: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Names and shapes must agree.

    Raises:
        InputError: naming the first tensor that differs.
    """
    for name in sorted(set(own) | set(weights)):
        one, other = own.get(name), weights.get(name)
        if one is None or other is None or one.shape != other.shape:
            there = None if other is None else tuple(other.shape)
            here = None if one is None else tuple(one.shape)
            raise InputError(
                "train.resume",
                str(path),
                f"does not match the config: {name} is {there} in the file, {here} in the model; "
                "train.initialize_from takes what fits",
            )
