"""Exponential moving average of all parameters, in one fused call per step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages of a module's parameters, under their names.

    Args:
        module: whose parameters are averaged.
        decay: reached from below, min(decay, (1 + n)/(10 + n)) after n updates.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = dict(module.named_parameters())
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take the parameters in, after ``updates`` earlier updates."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1.0 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin at the parameters as they are now."""
        self.load(self.parameters)

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Take averages from a checkpoint."""
        for name, average in self.averages.items():
            average.copy_(averages[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the context the module computes with its averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.averages[name] = self.averages[name], parameter.data
