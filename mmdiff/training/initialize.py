"""Fine-tuning: another model's weights are taken where they mean the same; what is new starts as it was drawn, or at 0
where it would disturb what was learned (see the backbone's `slots`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from mmdiff.errors import InputError
from mmdiff.model import MTDiffusionModel
from mmdiff.objective import MTObjective
from mmdiff.slots import Axes, take
from mmdiff.training.source import KEY, read_source

_LISTED = 6  # names in a printed line
_OF_MODALITIES = ("modalities", "schedule_shapes", "schedule_scales")  # what stands before a modality's name


@torch.no_grad()
def initialize(
    objective: MTObjective, source: str, say: Callable[[str], object], trust: bool = False, write: bool = True
) -> dict[str, Any]:
    """Take what fits, and say what was taken and what is new.

    Args:
        objective: of the new run, with fresh weights.
        source: a pipeline, a run or a checkpoint; only tensors of it are read.
        say: is given the lines.
        write: whether the objective is changed.
        trust: import the modalities that it names by import path and the new run does not.

    Returns:
        What `origin.json` keeps: the folder, the names of tensors that were taken whole, new and left out, and
        {name: what of it} of those that were taken in parts.

    Raises:
        InputError: nothing is there, nothing of it fits, or it is damaged.
    """
    path, model = Path(source).expanduser(), objective.model
    found = read_source(path, model.config.modality_config, say, trust)
    own, (axes, found_axes) = objective.state_dict(), _axes(model, found.model)
    other = _other_kinds(model, found.model)
    fitting = {
        name: take(own[name], found.weights[name], axes.get(name, {}), found_axes.get(name, {}))
        for name in sorted(set(own) & set(found.weights))
        if _modality(name) not in other
    }
    taken = {name: part for name, part in fitting.items() if part is not None}
    if not taken:
        raise InputError(KEY, str(path), "holds no tensor that fits the model by name, shape and meaning")
    if write:
        for name, part in taken.items():
            own[name].copy_(part.tensor)
    lists: dict[str, Any] = {
        "taken": _shown(name for name in taken if not taken[name].words),
        "partly": {_short(name): part.words for name, part in taken.items() if part.words},
        "new": _shown(set(own) - set(taken)),
        "left": _shown(set(found.weights) - set(taken)),
    }
    partly = [f"{name} ({words})" for name, words in lists["partly"].items()]
    say(f"{path}: {len(lists['taken'])} of {len(own)} tensors taken")
    for title, names in (("partly taken", partly), ("new", lists["new"]), ("left out", lists["left"])):
        say(f"  {title}: {_listed(names)}")
    return {"initialize_from": str(path.resolve()), **lists}


def _axes(one: MTDiffusionModel, other: MTDiffusionModel) -> tuple[dict[str, Axes], dict[str, Axes]]:
    """{name in the objective: axes} of both, whose classes go by name where both have names."""
    shared = set(one.names) & set(other.names)
    named = {name for name in shared if one.modalities[name].names and other.modalities[name].names}
    both = [{f"model.{name}": axes for name, axes in model.slots(named).items()} for model in (one, other)]
    return both[0], both[1]


def _other_kinds(one: MTDiffusionModel, other: MTDiffusionModel) -> set[str]:
    """Modalities that both have, of different classes."""
    shared = set(one.names) & set(other.names)
    return {name for name in shared if type(one.modalities[name]) is not type(other.modalities[name])}


def _modality(tensor: str) -> str | None:
    """The modality that a tensor of the objective belongs to."""
    part, _, rest = _short(tensor).partition(".")
    return rest.partition(".")[0] if part in _OF_MODALITIES else None


def _short(name: str) -> str:
    return name.removeprefix("model.")


def _shown(names: Iterable[str]) -> list[str]:
    return sorted(map(_short, names))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f", … ({len(names)})" if len(names) > _LISTED else "") or "nothing"
