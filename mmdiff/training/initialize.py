"""Fine-tuning: weights of another model are taken where name and shape agree, the rest stays as it was drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.objective import MTObjective
from mmdiff.training.checkpoint import find_checkpoint
from mmdiff.trust import check_links

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
    found, own = read_source(path, say), objective.model.state_dict()
    weights = {n: tensor for n, tensor in found.weights.items() if not _renamed(n, found.names, _names(objective))}
    taken = sorted(name for name in own if name in weights and weights[name].shape == own[name].shape)
    if not taken:
        raise InputError(KEY, str(path), "holds no tensor that fits the model by name and shape")
    for name in taken:
        own[name].copy_(weights[name])
    new, left = sorted(set(own) - set(taken)), sorted(set(found.weights) - set(taken))
    say(f"{path}: {len(taken)} of {len(own)} tensors taken; new: {_listed(new)}; left out: {_listed(left)}")
    return {"initialize_from": str(path.resolve()), "taken": taken, "new": new, "left": left}


class Source(NamedTuple):
    """``weights`` {name in the model: tensor}, and ``names`` {modality: names of its classes, or None}."""

    weights: dict[str, Tensor]
    names: dict[str, Any]


def read_source(path: Path, say: Callable[[str], object]) -> Source:
    """Weights, averaged where averages are there; arguments and errors as of `initialize`."""
    if not path.is_dir():
        raise InputError(KEY, str(path), "is no folder; name a pipeline, a run or a checkpoint")
    check_links(KEY, path)
    for folder in (path, path / "pipeline"):
        if (folder / _WEIGHTS).is_file():
            config = _json(folder / "model" / "config.json")
            return Source(_read(folder / _WEIGHTS), _class_names(config.get("modality_config")))
    checkpoint = find_checkpoint(path, KEY, say)
    found = {**checkpoint.weights, **checkpoint.ema}
    weights = {name.removeprefix("model."): tensor for name, tensor in found.items() if name.startswith("model.")}
    return Source(weights, _class_names((checkpoint.state.get("config") or {}).get("modalities")))


def _names(objective: MTObjective) -> dict[str, Any]:
    return _class_names(objective.model.config.modality_config)


def _class_names(modalities: Any) -> dict[str, Any]:
    kinds = modalities if isinstance(modalities, Mapping) else {}
    return {name: kind.get("names") for name, kind in kinds.items() if isinstance(kind, Mapping)}


def _renamed(tensor: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a tensor's rows belong to classes that have other names, or another order, now."""
    part, _, rest = tensor.partition(".")
    name = rest.partition(".")[0]
    return part == "modalities" and name in before and name in now and before[name] != now[name]


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(KEY, str(file), f"cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(KEY, str(file), f"cannot be read: {error}") from None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f", … ({len(names)})" if len(names) > _LISTED else "") or "nothing"
