"""Another model's weights as fine-tuning finds them: in a pipeline, a run or a checkpoint; only tensors are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmdiff.build import model_settings
from mmdiff.config import parse_config
from mmdiff.errors import InputError
from mmdiff.lora import merged_tensors
from mmdiff.model import MTDiffusionModel
from mmdiff.schedulers.weights import checked_weight
from mmdiff.training.checkpoint import STATE, checkpoints, find_checkpoint
from mmdiff.training.ema import first_average
from mmdiff.trust import check_links, custom_kinds, refuse_custom, refuse_huge

KEY = "train.initialize_from"
_WEIGHTS = "diffusion_pytorch_model"
_DAMAGE = (ValueError, TypeError, LookupError, RuntimeError, AttributeError, OverflowError, MemoryError)


class Source(NamedTuple):
    """``weights`` {name in the objective: tensor}, floating ones as float32, and the ``model`` that its config
    describes, whose own weights mean nothing."""

    weights: dict[str, Tensor]
    model: MTDiffusionModel


def read_source(path: Path, own: Mapping[str, Any], say: Callable[[str], object], trust: bool) -> Source:
    """Weights, averaged where averages are there.

    Args:
        path: a pipeline (or the model in it), a checkpoint, or a run: its newest checkpoint, else its pipeline.
        own: settings of the new run's modalities; what they name by import path is imported already.
        say: is given a line for each damaged checkpoint.
        trust: import what else the source's modalities name by import path.

    Raises:
        InputError: nothing is there, something is damaged or not finite, or code of others is not trusted.
    """
    if not path.is_dir():
        raise InputError(KEY, str(path), "is no folder; name a pipeline, a run or a checkpoint")
    check_links(KEY, path)
    for home in (path / "model", path):
        if _weight_files(home):
            return _of_pipeline(home, own, trust)
    kept = (path / STATE).exists() or checkpoints(path / "checkpoints")
    if not kept and _weight_files(path / "pipeline" / "model"):
        return _of_pipeline(path / "pipeline" / "model", own, trust)
    return _of_checkpoint(path, own, say, trust)


def _of_pipeline(home: Path, own: Mapping[str, Any], trust: bool) -> Source:
    model = _model(home / "config.json", _json(home / "config.json"), own, trust)
    weights: dict[str, Tensor] = {}
    for file in _weight_files(home):
        weights |= {f"model.{name}": tensor for name, tensor in _finite(file, _read(file)).items()}
    return _checked(home, Source(weights | _schedules(home.parent / "scheduler" / "scheduler_config.json"), model))


def _of_checkpoint(path: Path, own: Mapping[str, Any], say: Callable[[str], object], trust: bool) -> Source:
    checkpoint = find_checkpoint(path, KEY, say)
    try:
        config = parse_config(checkpoint.state.get("config"))
        settings, lora = model_settings(config), config.train.lora
    except InputError as error:
        raise InputError(KEY, str(checkpoint.path / STATE), f"its config is damaged: {error}") from None
    weights = _finite(checkpoint.path / "weights.safetensors", checkpoint.weights)
    averages = _finite(checkpoint.path / "ema.safetensors", first_average(checkpoint.ema))
    whole = merged_tensors({**weights, **averages}, 1.0 if lora is None else (lora.alpha or lora.rank) / lora.rank)
    return _checked(checkpoint.path, Source(whole, _model(checkpoint.path / STATE, settings, own, trust)))


def _weight_files(home: Path) -> list[Path]:
    """One file, or the shards of a large model."""
    whole = home / f"{_WEIGHTS}.safetensors"
    return [whole] if whole.is_file() else sorted(home.glob(f"{_WEIGHTS}*.safetensors"))


def _model(file: Path, config: Mapping[str, Any], own: Mapping[str, Any], trust: bool) -> MTDiffusionModel:
    """The model of a config; its classes say what the entries of the weights belong to."""
    arguments = {name: config.get(name) for name in ("modality_config", "backbone_config", "anchor", "diffused")}
    known = {kind for _, kind in custom_kinds(own, "")}
    try:
        for place, kind in custom_kinds(arguments["modality_config"], "modalities"):
            if trust is not True and kind not in known:
                refuse_custom({"kind": kind}, place.removesuffix(".kind"))
        refuse_huge(arguments["backbone_config"], "backbone")
        with torch.random.fork_rng(devices=[]):
            return MTDiffusionModel(**arguments)
    except _DAMAGE as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(KEY, str(file), f"its model cannot be built: {said}") from None


def _checked(path: Path, source: Source) -> Source:
    """The weights must be those of the model: what their entries mean is read off it."""
    for name, tensor in source.model.state_dict().items():
        weight = source.weights.get(f"model.{name}")
        if weight is not None and weight.shape != tensor.shape:
            there = f"{name} is {tuple(weight.shape)} in the weights, {tuple(tensor.shape)} by the config"
            raise InputError(KEY, str(path), f"its weights and its config do not belong together: {there}")
    return source


def _finite(file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors as float32.

    Raises:
        InputError: naming the file and the first tensor that is not finite.
    """
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    for name, tensor in floats.items():
        if not bool(tensor.isfinite().all()):
            raise InputError(KEY, str(file), f"{name} is not finite; name another checkpoint or pipeline")
    return floats


def _schedules(file: Path) -> dict[str, Tensor]:
    """Learned weight schedules of a pipeline's scheduler, by their names in the objective."""
    weights = _json(file).get("weights") if file.is_file() else None
    schedules: dict[str, Tensor] = {}
    for name, entry in weights.items() if isinstance(weights, dict) else ():
        if isinstance(entry, dict) and entry.get("schedule") == "learned":
            try:
                entry = checked_weight(name, entry)
            except InputError as error:
                raise InputError(KEY, str(file), f"is damaged: {error}") from None
            schedules[f"schedule_shapes.{name}"] = torch.tensor(entry["parameters"])
            schedules[f"schedule_scales.{name}"] = torch.tensor(entry.get("log_scale", 0.0))
    return schedules


def _json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(KEY, str(file), f"cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(KEY, str(file), "is no mapping of settings")
    return tree


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(KEY, str(file), f"cannot be read: {error}") from None
