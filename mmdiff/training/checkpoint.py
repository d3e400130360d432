"""Checkpoints as safetensors + JSON: written whole or not at all, rotated, read back bit by bit."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdiff.errors import InputError


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
    """Write `folder/step-N` atomically and remove the oldest beyond ``keep``.

    Args:
        folder: `checkpoints/` of the run.
        step: steps taken.
        module, averages, optimizer: the state.
        window: terms of the steps since the last line of metrics, (n, terms).
        facts: what else must be known to continue: threads, processes, scaler.
        keep: how many checkpoints stay.
    """
    final = folder / f"step-{step}"
    partial = folder / f".step-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    parts = {
        "weights": module.state_dict(),
        "ema": averages,
        "optimizer": optimizer_tensors(optimizer),
        "window": {"terms": window},
    }
    for name, tensors in parts.items():
        _save(tensors, partial / f"{name}.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step, **facts}, indent=1) + "\n")
    if final.exists():
        shutil.rmtree(final)
    partial.replace(final)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:  # on disk before the rename makes it count
        os.fsync(file.fileno())


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.split("-")[1]))


def load_checkpoint(
    path: Path, module: nn.Module, averages: Any, optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> tuple[dict[str, Any], Tensor]:
    """Restore a checkpoint; returns its state.json and the window.

    Raises:
        InputError: when it does not fit the module.
    """
    state = json.loads((path / "state.json").read_text())
    weights = load_file(path / "weights.safetensors")
    own = module.state_dict()
    for name in sorted(set(own) | set(weights)):
        one, other = own.get(name), weights.get(name)
        if one is None or other is None or one.shape != other.shape:
            there = None if other is None else tuple(other.shape)
            here = None if one is None else tuple(one.shape)
            raise InputError(
                "train.resume",
                str(path),
                f"does not match the config: {name} is {there} in the file, {here} in the model",
            )
    module.load_state_dict(weights)
    averages.load(load_file(path / "ema.safetensors"))
    load_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
    for key, value in facts.items():
        if key != "scaler" and state.get(key) != value:
            warnings.warn(
                f"{path.name} was written with {key} = {state.get(key)}, this run has {value}: it continues, but not "
                "bit-equally",
                stacklevel=2,
            )
    return state, load_file(path / "window.safetensors")["terms"]
