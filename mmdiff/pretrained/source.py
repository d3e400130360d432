"""What a source is: a network of diffusers in a folder or on the hub, or the backbone of a model of mmdiff.

Only its JSON and YAML are read, and nothing that they name is imported.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from mmdiff.backbones import BACKBONES, Backbone, NetworkBackbone, complete_config, find_backbone
from mmdiff.config import load_config, parse_config
from mmdiff.errors import InputError
from mmdiff.schedulers import SCHEDULERS
from mmdiff.schedulers.settings import settings_of
from mmdiff.trust import check_links, refuse_huge

KEY = "backbone.initialize_from"
_NETWORKS = {kind.network_class.__name__: name for name, kind in BACKBONES.items() if issubclass(kind, NetworkBackbone)}
_OLDER = {"Transformer2DModel": "DiTTransformer2DModel"}  # with adaLN-Zero, which diffusers renames while it loads
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LARGEST = 2**24  # bytes of a JSON file


class Found(NamedTuple):
    """What a source is.

    ``kind`` and ``settings`` of the backbone; ``scheduler``: settings of our scheduler, as far as they can express the
    source's; ``inexpressible``: what they cannot; ``network``: (folder or hub name, subfolder) of the weights of
    diffusers, None for a model of mmdiff.
    """

    kind: str
    settings: dict[str, Any]
    scheduler: dict[str, Any]
    inexpressible: str
    network: tuple[str, str | None] | None


class Source:
    """JSON files of a folder, or of a repository of the hub.

    Args:
        name: as `backbone.initialize_from` has it.

    Raises:
        InputError: it is neither a folder nor the name of a repository, or a link leads out of it.
    """

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, Path(name).expanduser()
        self.local = self.folder.is_dir()
        if self.local:
            check_links(KEY, self.folder)
        elif not _HUB_NAME.fullmatch(name):
            raise InputError(KEY, name, "is no folder; name one of diffusers or mmdiff, or a repository of the hub")

    def read(self, file: str) -> dict[str, Any] | None:
        """A JSON file by its path inside; None where there is none."""
        path = self.folder / file
        if not self.local:
            try:
                path = Path(hf_hub_download(self.name, file))
            except EntryNotFoundError:
                return None
            except (OSError, ValueError) as error:
                said = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise InputError(KEY, self.name, f"is no folder, and cannot be read from the hub: {said}") from None
        return read_json(path) if path.is_file() else None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of settings.

    Raises:
        InputError: naming the file.
    """
    try:
        if file.stat().st_size > _LARGEST:
            raise InputError(KEY, str(file), f"has {file.stat().st_size} bytes, too many for settings")
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(KEY, str(file), f"cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(KEY, str(file), "is no mapping of settings")
    return tree


def find(name: str) -> Found:
    """What a source is; only JSON and YAML of it are read.

    Raises:
        InputError: nothing that can be a backbone is there, or something is damaged.
    """
    source = Source(name)
    index = source.read("model_index.json") or {}
    parts = [part for part, entry in index.items() if _is_network(entry)]
    if len(parts) == 1:  # older pipelines have everything in one folder
        scheduler = source.read("scheduler/scheduler_config.json") or source.read("scheduler_config.json")
        part = parts[0] if source.read(f"{parts[0]}/config.json") is not None else None
        return _network(source, part, index[parts[0]][1], scheduler)
    config = source.read("config.json") or {}
    if _newer(config.get("_class_name")) in _NETWORKS:
        beside = source.folder.absolute().parent / "scheduler" / "scheduler_config.json"
        scheduler = read_json(beside) if source.local and beside.is_file() else None
        return _network(source, None, config["_class_name"], scheduler)
    if source.local:
        return _of_mmdiff(source)
    remedy = (
        "the hub has no network of diffusers of that name, or cannot be reached; download a pipeline of mmdiff first"
    )
    raise InputError(KEY, name, remedy)


def _newer(name: Any) -> Any:
    return _OLDER.get(name, name) if isinstance(name, str) else None


def _is_network(entry: Any) -> bool:
    """An entry of `model_index.json` that names a network of diffusers."""
    return isinstance(entry, list) and len(entry) == 2 and entry[0] == "diffusers" and _newer(entry[1]) in _NETWORKS


def _network(source: Source, part: str | None, name: str, scheduler: Mapping[str, Any] | None) -> Found:
    """A network of diffusers, alone or as a part of a pipeline."""
    file = "config.json" if part is None else f"{part}/config.json"
    config = source.read(file)
    if config is None:
        raise InputError(KEY, f"{source.name}/{file}", "is missing")
    if _newer(config.get("_class_name")) != _newer(name):
        raise InputError(KEY, f"{source.name}/{file}", f"describes a {config.get('_class_name')}, not a {name}")
    kind = _NETWORKS[_newer(name)]
    settings = {"network": complete_config(BACKBONES[kind].network_class, config)}
    ours, inexpressible = ({}, "") if scheduler is None else settings_of(scheduler)
    place = (str(source.folder / (part or "")), None) if source.local else (source.name, part)
    return Found(kind, settings, ours, inexpressible, place)


def _of_mmdiff(source: Source) -> Found:
    """The backbone of a pipeline, a run or a checkpoint."""
    folder = source.folder
    kept = (folder / "state.json").exists() or any(folder.glob("checkpoints/step-*"))
    for home in ("model/", "", *(() if kept else ("pipeline/model/",))):
        config = source.read(f"{home}config.json")
        if config is not None and isinstance(config.get("backbone_config"), dict):
            beside = (folder / home).parent / "scheduler" / "scheduler_config.json"
            scheduler = settings_of(read_json(beside)) if beside.is_file() else ({}, "")
            return _own(config["backbone_config"], *scheduler)
    state, file = source.read("state.json"), folder / "config.yaml"
    if state is None and not file.is_file():
        raise InputError(KEY, source.name, "holds no network; name one of diffusers, or a pipeline, run or checkpoint")
    try:
        whole = load_config(file) if state is None else parse_config(state.get("config"))
    except InputError as error:
        raise InputError(KEY, source.name, f"its config is damaged: {error}") from None
    ours = SCHEDULERS.get(whole.scheduler.kind)
    path = {"_class_name": getattr(ours, "__name__", None), **whole.scheduler.model_dump()}
    return _own({"kind": whole.backbone.kind, **whole.backbone.settings()}, *settings_of(path))


def _own(backbone: Mapping[str, Any], scheduler: dict[str, Any], inexpressible: str = "") -> Found:
    """With every argument of the backbone's class."""
    kind = find_backbone(backbone.get("kind"))
    settings = {name: value for name, value in backbone.items() if name != "kind"}
    refuse_huge(settings, "backbone")
    return Found(backbone["kind"], {**arguments_of(kind), **settings}, scheduler, inexpressible, None)


def arguments_of(kind: type[Backbone]) -> dict[str, Any]:
    """The defaults of the arguments that a config can set."""
    own = inspect.signature(kind.__init__).parameters
    return {n: plain(own[n].default) for n in own.keys() - inspect.signature(Backbone.__init__).parameters.keys()}


def plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value
