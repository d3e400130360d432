"""The linear layers of diffusers' attention."""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from torch import nn

_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def attention_layers(module: nn.Module) -> list[str]:
    """Their names in a module."""
    blocks = [name for name, block in module.named_modules() if isinstance(block, Attention)]
    return [f"{name}.{layer}" for name in blocks for layer in _LAYERS]
