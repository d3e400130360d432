"""What a config says of the source of its backbone, and what the source says to the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdiff.backbones import NetworkBackbone, complete_config, find_backbone
from mmdiff.config import Config
from mmdiff.errors import InputError
from mmdiff.pretrained.source import Found, arguments_of, find, plain
from mmdiff.schedulers.settings import BETAS, PATH


def with_source(config: Config) -> Config:
    """The config with the backbone that `backbone.initialize_from` names, complete, and with its path and solver where
    the config leaves them open. A complete one is returned as it is: the source need not be there any more.

    Raises:
        InputError: the source cannot be used, or the config contradicts it.
    """
    backbone, scheduler = config.backbone, config.scheduler
    if backbone.initialize_from is None or is_complete(config):
        return complete_network(config)
    found = find(backbone.initialize_from)
    check_agrees(config, found)
    joined = _joined(found.settings, backbone.settings())
    settings = {"initialize_from": backbone.initialize_from, "kind": found.kind, **joined}
    chosen = scheduler.model_dump(exclude_unset=True)
    taken = found.scheduler if chosen.get("kind", found.scheduler.get("kind")) == found.scheduler.get("kind") else {}
    if "solver" in chosen:
        taken = {name: value for name, value in taken.items() if name != "solver_config"}
    if any(name in chosen for name in BETAS):
        taken = {name: value for name, value in taken.items() if name not in BETAS}
    return config.model_copy(
        update={
            "backbone": type(backbone).model_validate(settings),
            "scheduler": type(scheduler).model_validate({**taken, **chosen}),
        }
    )


def contradictions(config: Config, found: Found) -> list[str]:
    """In which settings that its weights depend on the config's scheduler is not the source's, a line each."""
    source, lines = config.backbone.initialize_from, []
    theirs, ours = found.scheduler, config.scheduler.model_dump()
    if found.inexpressible:
        lines.append(f"scheduler: that of {source} cannot be expressed in full, {found.inexpressible}")
    for name in ("kind", *PATH) if theirs else ():
        if ours.get(name) != theirs.get(name, ours.get(name)):
            there = f"{theirs[name]!r}" if name != "trained_betas" else "other betas"
            lines.append(f"scheduler.{name} = {ours.get(name)!r}: {source} was trained with {there}")
    return lines


def complete_network(config: Config) -> Config:
    """The config with every argument of a network of diffusers that it describes itself."""
    kind, network = find_backbone(config.backbone.kind), config.backbone.settings().get("network")
    if network is None or not issubclass(kind, NetworkBackbone):
        return config
    settings = {**config.backbone.model_dump(), "network": complete_config(kind.network_class, network)}
    return config.model_copy(update={"backbone": type(config.backbone).model_validate(settings)})


def is_complete(config: Config) -> bool:
    """Whether the config builds its backbone without the source."""
    backbone, settings = config.backbone, config.backbone.settings()
    kind, network = find_backbone(backbone.kind), settings.get("network")
    if not issubclass(kind, NetworkBackbone):
        return set(arguments_of(kind)) <= set(settings)
    return isinstance(network, dict) and set(complete_config(kind.network_class, {})) <= set(network)


def check_agrees(config: Config, found: Found) -> None:
    """The config's own settings of the backbone must be those of the source.

    Raises:
        InputError: naming the first that differs.
    """
    backbone, kind = config.backbone, find_backbone(found.kind)
    if "kind" in backbone.model_fields_set and backbone.kind not in (found.kind, *kind.stands_for):
        raise InputError("backbone.kind", backbone.kind, f"{backbone.initialize_from} is of kind {found.kind}")
    theirs = _flat(found.settings)
    for name, value in _flat(backbone.settings()).items():
        there = theirs.get(name, value)
        if plain(value) != plain(there) and name.rpartition(".")[2] not in kind.training_only:
            remedy = f"{backbone.initialize_from} has {there!r}; leave it out"
            raise InputError(f"backbone.{name}", value, remedy)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """With those of the network as network.NAME."""
    network = settings.get("network")
    inner = {f"network.{name}": value for name, value in network.items()} if isinstance(network, dict) else {}
    return {name: value for name, value in settings.items() if name != "network" or not inner} | inner


def _joined(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The source's settings, and the config's own, which agree or change the training alone."""
    joined = {**theirs, **own}
    if isinstance(theirs.get("network"), dict) and isinstance(own.get("network"), dict):
        joined["network"] = {**theirs["network"], **own["network"]}
    return joined
