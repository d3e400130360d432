"""Fine-tuning: weights of another model are taken where name and shape agree, the rest stays as it was drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.objective import MTObjective
from mmdiff.strangers import check_links
from mmdiff.training.checkpoint import newest

KEY = "train.initialize_from"
_WEIGHTS = Path("model") / "diffusion_pytorch_model.safetensors"
_LISTED = 6  # names in a printed line


@torch.no_grad()
def initialize(objective: MTObjective, path: Path, say: Callable[[str], object]) -> dict[str, Any]:
    """Take what fits, and say what was taken and what is new.

    Args:
        objective: of the new run, with fresh weights.
        path: a pipeline, a run (its pipeline, else its newest checkpoint's averages) or a checkpoint; only tensors of
            it are read.
        say: is given the lines.

    Returns:
        What `origin.json` keeps: the folder, and the names of the tensors taken, new and left out.

    Raises:
        InputError: nothing is there, or nothing of it fits.
    """
    weights, own = read_weights(path, say), objective.model.state_dict()
    taken = sorted(name for name in own if name in weights and weights[name].shape == own[name].shape)
    if not taken:
        raise InputError(KEY, str(path), "holds no tensor that fits the model by name and shape")
    for name in taken:
        own[name].copy_(weights[name])
    new, left = sorted(set(own) - set(taken)), sorted(set(weights) - set(taken))
    say(f"{path}: {len(taken)} of {len(own)} tensors taken; new: {_listed(new)}; left out: {_listed(left)}")
    return {"initialize_from": str(path.resolve()), "taken": taken, "new": new, "left": left}


def read_weights(path: Path, say: Callable[[str], object]) -> dict[str, Tensor]:
    """{name in the model: tensor}, averaged where averages are there; arguments and errors as of `initialize`."""
    if not path.is_dir():
        raise InputError(KEY, str(path), "is no folder; name a pipeline, a run or a checkpoint")
    check_links(KEY, path)
    for file in (path / _WEIGHTS, path / "pipeline" / _WEIGHTS):
        if file.is_file():
            return _read(file)
    if (path / "ema.safetensors").is_file():
        found = {**_read(path / "weights.safetensors"), **_read(path / "ema.safetensors")}
    else:
        checkpoint = newest(path / "checkpoints", say)
        if checkpoint is None:
            raise InputError(KEY, str(path), "holds neither a pipeline nor a checkpoint")
        found = {**checkpoint.weights, **checkpoint.ema}
    return {name.removeprefix("model."): tensor for name, tensor in found.items() if name.startswith("model.")}


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(KEY, str(file), f"cannot be read: {error}") from None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f", … ({len(names)})" if len(names) > _LISTED else "") or "nothing"
