"""The folder of an adapter: peft's two files, and beside them the parts of the modalities that were trained whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdiff.errors import InputError
from mmdiff.lora.layers import ADAPTER, A, B, base_name, ends_in, inject, layers, of_modalities, peft_package, remove
from mmdiff.trust import LARGEST, check_links

KEY = "lora"
CONFIG, LAYERS, WHOLE = "adapter_config.json", "adapter_model.safetensors", "trained.safetensors"
_PREFIX = "base_model.model."  # of names in peft's files
_READ = ("r", "lora_alpha", "target_modules")  # settings that are used
_FREE = ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type", "lora_dropout")
_LARGEST_CONFIG = 2**20  # bytes


def save(model: nn.Module, folder: Path) -> None:
    """Write a model's adapter: peft's two files, and what was trained whole.

    Args:
        model: with LoRA layers.
        folder: is made.
    """
    adapted = layers(model)
    one = next(iter(adapted.values()))
    config = peft_package().LoraConfig(
        r=one.r[ADAPTER], lora_alpha=one.lora_alpha[ADAPTER], target_modules=sorted(adapted)
    )
    folder.mkdir(parents=True)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    own = {f"{_PREFIX}{name.replace(f'.{ADAPTER}', '')}": t for name, t in state.items() if name.endswith((A, B))}
    save_file(own, folder / LAYERS, metadata={"format": "pt"})
    whole = {name for name, p in model.named_parameters() if p.requires_grad and not name.endswith((A, B))}
    if whole:
        whole |= {name for name, _ in model.named_buffers() if name in state and of_modalities(model, name)}
        save_file({name: state[name] for name in whole}, folder / WHOLE, metadata={"format": "pt"})


class Adapter:
    """An adapter that was loaded into a model, and what is needed to take it out again, bit by bit.

    Args:
        model: without LoRA layers.
        folder: that `save` or peft wrote; nothing in it is run.

    Raises:
        InputError: naming what does not fit, before the model is changed.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, folder: Path) -> None:
        if layers(model):
            raise InputError(KEY, str(folder), "another adapter is loaded; call fuse_lora or unload_lora_weights first")
        if not folder.is_dir():
            raise InputError(KEY, str(folder), "is no folder; name one with an adapter")
        check_links(KEY, folder)
        rank, alpha, names = _read_config(folder / CONFIG, model)
        weights = _read_layers(folder / LAYERS, model, names, rank)
        whole = _read_whole(folder / WHOLE, model) if (folder / WHOLE).is_file() else {}
        self.model, self.trained = model, {name: p.requires_grad for name, p in model.named_parameters()}
        state = model.state_dict()
        self.before = {name: state[name].clone() for name in whole}
        for name, tensor in whole.items():
            state[name].copy_(tensor)
        devices = [next(model.parameters()).device] if next(model.parameters()).is_cuda else []
        with torch.random.fork_rng(devices=devices):
            inject(model, names, rank, alpha)
        state = model.state_dict()
        for name, tensor in weights.items():
            state[name].copy_(tensor)
        for name, parameter in model.named_parameters():  # kernels round otherwise where nothing needs a gradient
            parameter.requires_grad_(self.trained.get(base_name(name), True))

    def fuse(self) -> None:
        """Merge the layers into the model's weights."""
        self.before |= remove(self.model, merge=True)

    @torch.no_grad()
    def unload(self) -> None:
        """Give the model the weights that it had."""
        remove(self.model, merge=False)
        state = self.model.state_dict()
        for name, tensor in self.before.items():
            state[name].copy_(tensor)


def _read_config(file: Path, model: nn.Module) -> tuple[int, float, list[str]]:
    """(r, α, names of the layers); other settings must be those of a plain LoRA."""
    config = _json(file)
    usual = json.loads(json.dumps(peft_package().LoraConfig().to_dict(), default=str))
    for name, value in config.items():
        if name not in (*_READ, *_FREE, "peft_type") and value not in (usual.get(name), None, False):
            raise InputError(f"{file.name}: {name}", value, "is no plain LoRA; merge it where it was trained")
    rank, alpha, names = (config.get(name) for name in _READ)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{file.name}: peft_type", config.get("peft_type"), "needs LORA")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= LARGEST:
        raise InputError(f"{file.name}: r", rank, f"needs 1 … {LARGEST}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= LARGEST:
        raise InputError(f"{file.name}: lora_alpha", alpha, f"needs a number up to {LARGEST}")
    linear = {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{file.name}: target_modules", names, "needs a list of names")
    for name in names:
        if not any(ends_in(layer, name) for layer in linear):
            raise InputError(f"{file.name}: target_modules", name, "is no linear layer of this model")
    return rank, float(alpha), sorted(layer for layer in linear if any(ends_in(layer, name) for name in names))


def _read_layers(file: Path, model: nn.Module, names: list[str], rank: int) -> dict[str, Tensor]:
    """{name in the model with LoRA layers: tensor}."""
    shapes = {}
    for name in names:
        out, inner = model.get_submodule(name).weight.shape
        shapes |= {name + A: (rank, inner), name + B: (out, rank)}
    tensors = _tensors(file)
    weights = {_with_adapter(name.removeprefix(_PREFIX)): tensor for name, tensor in tensors.items()}
    return _fitting(file, weights, shapes)


def _with_adapter(name: str) -> str:
    return name.removesuffix(".weight") + f".{ADAPTER}.weight"


def _read_whole(file: Path, model: nn.Module) -> dict[str, Tensor]:
    tensors, state = _tensors(file), model.state_dict()
    return _fitting(file, tensors, {name: tuple(state[name].shape) for name in tensors if name in state})


def _fitting(file: Path, tensors: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """All of them, finite."""
    for name in sorted(set(tensors) | set(shapes)):
        there = tuple(tensors[name].shape) if name in tensors else None
        if there != shapes.get(name):
            remedy = f"{name} is {there} in the file, {shapes.get(name)} by its config and the model"
            raise InputError(KEY, str(file), remedy)
        if not bool(tensors[name].isfinite().all()):
            raise InputError(KEY, str(file), f"{name} is not finite")
    return tensors


def _tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise InputError(KEY, str(file), "is missing; only safetensors are read")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(KEY, str(file), f"cannot be read: {error}") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _LARGEST_CONFIG:
            raise InputError(KEY, str(file), "is too large for settings")
        tree = json.loads(file.read_text(encoding="utf-8"))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(KEY, str(file), f"cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(KEY, str(file), "is no mapping of settings")
    return tree
