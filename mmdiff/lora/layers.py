"""LoRA layers in a model's backbone: put in, merged, taken out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdiff.errors import InputError

KEY = "train.lora"
ADAPTER = "default"  # the name that peft gives to the one that is used
A, B = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"  # ends of the names of the layers' own tensors
_BASE = ".base_layer."


def add(
    model: nn.Module, rank: int, alpha: float | None = None, targets: Sequence[str] | None = None, whole: bool = True
) -> None:
    """Put LoRA layers into a model's backbone; they compute 0 until they are trained. Draws from torch's generator.

    Args:
        model: with ``backbone``; only what trains keeps `requires_grad`.
        rank: r.
        alpha: α; by default r.
        targets: ends of the names of linear layers, such as `to_q`; by default those of the backbone's attention.
        whole: whether the parts of the modalities are trained, too.

    Raises:
        InputError: peft is not there, or a target names no linear layer that is frozen.
    """
    names = [f"backbone.{name}" for name in _targets(model.backbone, targets)]
    trained = [p for name, p in model.named_parameters() if p.requires_grad and whole and of_modalities(model, name)]
    inject(model, names, rank, rank if alpha is None else alpha)
    for parameter in trained:
        parameter.requires_grad_(True)


def of_modalities(model: nn.Module, name: str) -> bool:
    """Whether a tensor is not of the network that LoRA leaves as it is."""
    inner = name.removeprefix("backbone.")
    return inner == name or inner.startswith(model.backbone.modality_parts)


def _targets(backbone: Any, targets: Sequence[str] | None) -> list[str]:
    """Names of the layers in the backbone."""
    linear = [name for name, layer in backbone.named_modules() if type(layer) is nn.Linear]
    frozen = [name for name in linear if not name.startswith(backbone.modality_parts)]
    if targets is None:
        names = [name for name in backbone.attention_layers() if name in frozen]
        if not names:
            remedy = "the network has no attention; name linear layers, for example " + ", ".join(_ends(frozen))
            raise InputError(f"{KEY}.targets", None, remedy)
        return names
    for target in targets:
        if not any(ends_in(name, target) for name in frozen):
            remedy = f"ends the name of no linear layer of the network; choose from {', '.join(_ends(frozen))}"
            raise InputError(f"{KEY}.targets", target, remedy)
    return [name for name in frozen if any(ends_in(name, target) for target in targets)]


def ends_in(name: str, end: str) -> bool:
    """Whether a name ends in whole parts: a.to_q in to_q, not in q."""
    return f".{name}".endswith(f".{end}")


def _ends(names: Iterable[str], most: int = 12) -> list[str]:
    """The last parts of names, without numbers."""
    last = {".".join(name.split(".")[-2:]) if name.split(".")[-1].isdigit() else name.split(".")[-1] for name in names}
    return sorted(last)[:most]


def inject(model: nn.Module, names: list[str], rank: int, alpha: float) -> None:
    """Put fresh layers in, by the whole names of those that they adapt; nothing else keeps `requires_grad`."""
    peft = peft_package()
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), model, ADAPTER)


def peft_package() -> Any:
    """The package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise InputError(KEY, "peft", "is not installed; pip install 'mmdiff[lora]'") from None
    return peft


def layers(model: nn.Module) -> dict[str, Any]:
    """{name: LoRA layer} of a model."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def base_name(name: str) -> str:
    """The name of a tensor in a model without LoRA."""
    return name.replace(_BASE, ".")


def base(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state under their names in a model without LoRA, the layers' own left out."""
    return {base_name(name): tensor for name, tensor in tensors.items() if not name.endswith((A, B))}


def merged_tensors(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A state with LoRA layers as that of a model without: W + ``scale`` B A.

    Args:
        tensors: {name: tensor}.
        scale: α / r.
    """
    merged = base(tensors)
    for name in [name.removesuffix(A) for name in tensors if name.endswith(A)]:
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + scale * (tensors[name + B] @ tensors[name + A])
    return merged


def merged(model: nn.Module) -> nn.Module:
    """The model itself, or with LoRA layers a copy of it in which they are merged."""
    if not layers(model):
        return model
    model = copy.deepcopy(model)
    remove(model, merge=True)
    return model


@torch.no_grad()
def remove(model: nn.Module, merge: bool) -> dict[str, Tensor]:
    """Take the LoRA layers out. Returns {name: W before} of those that were merged."""
    before: dict[str, Tensor] = {}
    for name, layer in layers(model).items():
        linear = layer.get_base_layer()
        if merge:
            before[f"{name}.weight"] = linear.weight.detach().clone()
            delta = layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight
            linear.weight.copy_(linear.weight + layer.scaling[ADAPTER] * delta)
        model.set_submodule(name, linear)
    if hasattr(model, "peft_config"):
        del model.peft_config
    return before
