"""Checkpoints as safetensors + JSON: written whole or not at all, checked by hash, rotated, read back bit by bit."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdiff.errors import InputError, TrainingError
from mmdiff.training import shards
from mmdiff.training.disk import PARTIAL, remove, whole
from mmdiff.training.sealed import STATE, DamagedError, check_hash, read_state, read_tensors, seal
from mmdiff.training.shards import local
from mmdiff.trust import check_links

PARTS = ("weights", "ema", "optimizer", "window")
_OURS = re.compile(r"step-(0|[1-9][0-9]*)")  # nothing else in the folder is read or deleted


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose hashes are right, with ``state`` of its state.json; tensors are read when they are asked for.

    Its tensors are in one file per part, or in shards that any number of processes reads (`mmdiff.training.sharded`).
    """

    path: Path
    state: dict[str, Any]

    @property
    def sharded(self) -> bool:
        """Whether the tensors lie in shards."""
        return "weights.safetensors" not in self.state["files"]

    def layout(self, part: str) -> dict[str, Tensor]:
        """{name: a tensor of its shape} of one of `PARTS`."""
        if not self.sharded:
            return self._tensors(part)
        shapes = {n: t for n, t in self._shapes.items() if n.startswith(f"{part}.")}
        return {name.removeprefix(f"{part}."): tensor for name, tensor in shapes.items()}

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The objective's state, on the CPU."""
        return self._tensors("weights")

    @cached_property
    def ema(self) -> dict[str, Tensor]:
        """As `Ema.tensors`."""
        return self._tensors("ema")

    @cached_property
    def optimizer(self) -> dict[str, Tensor]:
        """As `optimizer_tensors`."""
        return self._tensors("optimizer")

    @cached_property
    def window(self) -> Tensor:
        """Terms of the steps since the last line of metrics, (n, terms)."""
        return read_tensors(self.path / "window.safetensors")["terms"]

    @cached_property
    def _shapes(self) -> dict[str, Tensor]:
        return shards.shapes(self.path)

    def _tensors(self, part: str) -> dict[str, Tensor]:
        if self.sharded:
            return shards.read_whole(self.path, f"{part}.")
        return read_tensors(self.path / f"{part}.safetensors")


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
    for path in folder.iterdir() if folder.is_dir() else ():
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
    folder: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], facts: dict[str, Any], keep: int
) -> None:
    """Write the tensors of ``parts``, {one of `PARTS`: {name: tensor}}; the rest as of `new_checkpoint`."""
    with new_checkpoint(folder, step, facts, keep) as partial:
        for part, tensors in parts.items():
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(plain, partial / f"{part}.safetensors")


@contextlib.contextmanager
def new_checkpoint(folder: Path, step: int, facts: dict[str, Any], keep: int) -> Iterator[Path]:
    """A folder to write to, which becomes `folder/step-N`, whole or not at all; the oldest beyond ``keep`` go then.

    Args:
        folder: `checkpoints/` of the run.
        step: steps taken.
        facts: what else must be known to continue: threads, processes, scaler, data, config.
        keep: how many checkpoints stay.
    """
    final = folder / f"step-{step}"
    if final.exists():  # damaged: a run never takes a step twice otherwise
        remove(final)
    with whole(final) as partial:
        partial.mkdir()
        yield partial
        seal(partial, {"step": step, **facts})
    for old in [path for path in checkpoints(folder) if step_of(path) <= step][:-keep]:
        remove(old)


def check_averages(averages: Mapping[str, Tensor], step: int) -> None:
    """Averages that are not finite are never saved.

    Raises:
        TrainingError: naming the first of them.
    """
    finite = torch.stack([local(average).isfinite().all() for average in averages.values()]).tolist()
    for name, fine in zip(averages, finite, strict=True):
        if not fine:
            raise TrainingError(
                f"step {step}: the average of {name} is not finite; nothing was saved; lower train.learning_rate"
            )


# -------------------------------------------------------------------------------------------------------------- reading


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint and check every hash.

    Raises:
        DamagedError: saying what is wrong with which file.
    """
    state = read_state(path)
    if _OURS.fullmatch(path.name) and state.get("step") != step_of(path):
        raise DamagedError(f"{STATE} is that of step {state.get('step')}")
    checkpoint = Checkpoint(path, state)
    names = [f"{part}.safetensors" for part in PARTS]
    if checkpoint.sharded:
        there = {file.name for file in path.glob("*.safetensors")}
        names = sorted(set(state["files"]) | there | {"window.safetensors"})
    for name in names:
        if name not in (f"{part}.safetensors" for part in PARTS) and not shards.NAME.fullmatch(name):
            raise DamagedError(f"{name} is no file of a checkpoint")
        check_hash(path / name, state)
    if checkpoint.sharded and not {n.partition(".")[0] for n in checkpoint._shapes} >= {*PARTS[:3]}:
        raise DamagedError("it holds no weights, averages and optimizer")
    return checkpoint


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
    check_fits(checkpoint.path, module.state_dict(), checkpoint.weights)
    check_fits(checkpoint.path, averages.tensors(), checkpoint.ema)
    module.load_state_dict(checkpoint.weights)
    averages.load(checkpoint.ema)
    load_optimizer(optimizer, checkpoint.optimizer)


def check_fits(path: Path, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
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
