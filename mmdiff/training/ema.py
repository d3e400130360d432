"""Averages of all parameters: exponential ones, and power-function ones of which any width can be made afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmdiff import lora
from mmdiff.training.shards import local
from mmdiff.training.width import exponent


class Ema:
    """Averages of a module's parameters, each in one fused call per step; the first is the one that samples.

    Args:
        module: whose parameters are averaged. Those that lie in parts are averaged in parts.
        decay: of the exponential averages, reached from below: min(decay, (1 + n)/(10 + n)) after n updates.
        sigma_rel: relative widths of the power-function averages (Karras et al., 2024, arXiv 2312.02696).

    Attributes:
        kept: {label: {name: average}}.
        snapshots: labels of the power-function averages.
    """

    def __init__(self, module: nn.Module, decay: float | Sequence[float], sigma_rel: Sequence[float] = ()) -> None:
        decays = decay if isinstance(decay, Sequence) else (decay,)
        self._decays: dict[str, Callable[[int], float]] = {
            **{f"decay={value}": _exponential(value) for value in decays},
            **{f"sigma_rel={value}": _power(value) for value in sigma_rel},
        }
        self.snapshots = tuple(f"sigma_rel={value}" for value in sigma_rel)
        whole = not lora.layers(module)  # the network under LoRA layers stays as it is, without a second copy
        self.parameters = {name: p for name, p in module.named_parameters() if whole or p.requires_grad}
        self.kept = {label: {n: p.detach().clone() for n, p in self.parameters.items()} for label in self._decays}

    @property
    def label(self) -> str:
        """What the average that samples is called."""
        return next(iter(self.kept))

    @property
    def averages(self) -> dict[str, Tensor]:
        """The average that samples, under the parameters' names."""
        return next(iter(self.kept.values()))

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take the parameters in, after ``updates`` earlier updates."""
        parameters = [local(p) for p in self.parameters.values()]
        for label, decay in self._decays.items():
            averages = [local(average) for average in self.kept[label].values()]
            torch._foreach_lerp_(averages, parameters, 1.0 - decay(updates))

    @torch.no_grad()
    def restart(self) -> None:
        """Begin at the parameters as they are now."""
        for averages in self.kept.values():
            for name, average in averages.items():
                local(average).copy_(local(self.parameters[name]))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the first average under the parameters' names, the others under "LABEL/NAME"."""
        first, *others = self.kept
        named = {f"{label}/{name}": tensor for label in others for name, tensor in self.kept[label].items()}
        return {**self.kept[first], **named}

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        for name, average in self.tensors().items():
            average.copy_(averages[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the context the module computes with the first average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.averages[name] = self.averages[name], parameter.data


def first_average(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of `Ema.tensors` those of the average that samples."""
    return {name: tensor for name, tensor in tensors.items() if "/" not in name}


def _exponential(decay: float) -> Callable[[int], float]:
    return lambda updates: min(decay, (1 + updates) / (10 + updates))


def _power(sigma_rel: float) -> Callable[[int], float]:
    """β of the (n + 1)-th update, (1 − 1/t)^(γ + 1) at t = n + 1: the first update takes the parameters whole."""
    gamma = exponent(sigma_rel)
    return lambda updates: (1 - 1 / (updates + 1)) ** (gamma + 1)
