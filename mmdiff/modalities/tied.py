"""Tied modules in a state dict: every tensor once, as safetensors wants it."""

from __future__ import annotations

from typing import Any

from torch import nn


class TiedState(nn.Module):
    """A module whose state holds a tensor of several names once, under its first name."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_without_repeats)
        self.register_load_state_dict_pre_hook(_with_repeats)


def _repeats(modality: nn.Module) -> dict[str, str]:
    """{further name: first name} of tensors that have several, as those of tied modules."""
    first: dict[int, str] = {}
    every = (modality.named_parameters, modality.named_buffers)
    named = [(name, tensor) for names in every for name, tensor in names(remove_duplicate=False)]
    kept = {name: first.setdefault(id(tensor), name) for name, tensor in named}
    return {name: other for name, other in kept.items() if name != other}


def _without_repeats(modality: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state holds every tensor once: safetensors refuses a second name for one."""
    for name in _repeats(modality):
        state.pop(prefix + name, None)


def _with_repeats(modality: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state that is loaded gets the further names back."""
    for name, kept in _repeats(modality).items():
        if prefix + kept in state:
            state.setdefault(prefix + name, state[prefix + kept])
