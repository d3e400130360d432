"""Fine-tuning: another model's weights are taken where they mean the same; what is new starts as it was drawn, or at 0
where it would disturb what was learned (see the backbone's `slots`). The backbone alone may be one of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdiff import pretrained
from mmdiff.backbones import NetworkBackbone
from mmdiff.config import Config
from mmdiff.errors import InputError, at
from mmdiff.lora import base_name
from mmdiff.model import MTDiffusionModel
from mmdiff.objective import MTObjective
from mmdiff.pretrained import check_agrees, contradictions, find, load_network
from mmdiff.slots import Axes, take
from mmdiff.training.source import KEY, read_source

_LISTED = 6  # names in a printed line
# what stands before a modality's name
_OF_MODALITIES = ("modalities", "schedule_shapes", "schedule_scales", "log_weights")


@torch.no_grad()
def initialize(
    objective: MTObjective,
    source: str,
    say: Callable[[str], object],
    trust: bool = False,
    write: bool = True,
    only: str = "",
) -> dict[str, Any]:
    """Take what fits, and say what was taken and what is new.

    Args:
        objective: of the new run, with fresh weights.
        source: a pipeline, a run or a checkpoint; only tensors of it are read.
        say: is given the lines.
        write: whether the objective is changed.
        trust: import the modalities that it names by import path and the new run does not.
        only: what the names of the tensors begin with.

    Returns:
        What `origin.json` keeps: the folder, the names of tensors that were taken whole, new and left out, and
        {name: what of it} of those that were taken in parts.

    Raises:
        InputError: nothing is there, nothing of it fits, or it is damaged.
    """
    path, model = Path(source).expanduser(), objective.model
    read = read_source(path, model.config.modality_config, say, trust)
    own = _beginning(only, {base_name(name): tensor for name, tensor in objective.state_dict().items()})
    weights = _beginning(only, read.weights)
    axes, source_axes = _axes(model, read.model)
    other = _other_kinds(model, read.model)
    fitting = {
        name: take(own[name], weights[name], axes.get(name, {}), source_axes.get(name, {}))
        for name in sorted(set(own) & set(weights))
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
        "left": _shown(set(weights) - set(taken)),
    }
    partly = [f"{name} ({words})" for name, words in lists["partly"].items()]
    say(f"{path}: {len(lists['taken'])} of {len(own)} tensors taken")
    for title, names in (("partly taken", partly), ("new", lists["new"]), ("left out", lists["left"])):
        say(f"  {title}: {_listed(names)}")
    return {"initialize_from": str(path.resolve()), **lists}


@torch.no_grad()
def initialize_backbone(
    objective: MTObjective, config: Config, say: Callable[[str], object], trust: bool = False, write: bool = True
) -> dict[str, Any]:
    """Give the backbone the weights that `backbone.initialize_from` names: it predicts what its source does.

    Args:
        objective: of the new run, with fresh weights.
        config: resolved.
        say, trust, write: as of `initialize`; a network of diffusers is written in any case.

    Returns:
        As of `initialize`, under `backbone`.

    Raises:
        InputError: the source is gone, is another one than the config says, or is damaged.
    """
    source = config.backbone.initialize_from
    assert source is not None
    described = find(source)
    check_agrees(config, described)
    if described.network is None:
        with at(keys={KEY: pretrained.KEY}):
            origin = initialize(objective, source, say, trust, write, only="model.backbone.")
        if origin["left"]:
            remedy = f"its backbone does not fit this one: {origin['left'][0]} finds no place"
            raise InputError(pretrained.KEY, source, remedy)
    else:
        network, backbone = load_network(described), objective.model.backbone
        own = {base_name(name): tensor for name, tensor in backbone.network.state_dict().items()}
        for name, tensor in network.state_dict().items():
            own[name].copy_(tensor)
        _check_prediction(source, network, backbone)
        count = len(network.state_dict())
        say(f"{source}: all {count} tensors of a {type(network).__name__} taken, as backbone.kind {described.kind}")
        folder = Path(source).expanduser()
        origin = {"initialize_from": str(folder.resolve()) if folder.is_dir() else source}
    for line in contradictions(config, described):
        say(f"warning: {line}; the first samples are not the source's")
    return {"backbone": origin}


def _check_prediction(source: str, network: Any, backbone: NetworkBackbone) -> None:
    """Another version of diffusers may compute something else than the backbone does."""
    training = backbone.training
    device = next(backbone.parameters()).device
    sample, timestep, observation = backbone.examples(device)
    one = backbone.eval()(sample, timestep, observation).prediction
    other = backbone.alone(network.to(device), sample, timestep)
    backbone.train(training)
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max())):
        raise InputError(pretrained.KEY, source, "the backbone does not predict what this network does")


def _beginning(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(start)}


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
