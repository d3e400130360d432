"""How the state of a run lies on its processes: `Replicated` whole on each; `mmdiff.training.sharded` in parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmdiff.config import TrainConfig
from mmdiff.training.checkpoint import (
    Checkpoint,
    check_averages,
    load_checkpoint,
    optimizer_tensors,
    save_checkpoint,
)
from mmdiff.training.ema import Ema
from mmdiff.training.process import on_main

MakeOptimizer = Callable[[nn.Module, TrainConfig], torch.optim.Optimizer]


class Replicated:
    """Every process holds weights, gradients, moments and averages; DDP averages the gradients.

    Args:
        accelerator: of the run.
        config: of the run.

    Attributes:
        late: whether the state can only be laid out once the weights have their first values.
        in_place: whether every process can compute with the averages in the place of the weights.
        objective: what a step calls.
        optimizer: torch's.
    """

    late = False
    in_place = True
    objective: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, accelerator: Accelerator, config: TrainConfig) -> None:
        self.accelerator, self.config = accelerator, config

    def lay_out(self, bare: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Make ``objective`` and ``optimizer`` from the whole module."""
        self.bare = bare
        self._parameters = list(bare.parameters())  # to find them takes a millisecond
        self.objective, self._stepper = self.accelerator.prepare(bare, make_optimizer(bare, self.config))
        self.optimizer = self._stepper.optimizer

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """The forward and backward pass of a part of a batch; gradients are averaged over processes in the last."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.objective):
            yield

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a part."""
        self.accelerator.backward(loss)

    def update(self) -> Tensor:
        """Clip the gradients, take the step and clear them; their norm before."""
        norm = self.accelerator.clip_grad_norm_(self._parameters, self.config.max_grad_norm)
        self._stepper.step()
        self._stepper.zero_grad()
        return norm

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors put together, for the main process; every process must call it."""
        return dict(tensors)

    def save(self, folder: Path, step: int, ema: Ema, rows: Tensor, facts: dict[str, Any]) -> None:
        """Write a checkpoint; what the process that writes raises is raised on all."""
        parts = {
            "weights": self.bare.state_dict(),
            "ema": ema.tensors(),
            "optimizer": self.optimizer_tensors(),
            "window": {"terms": rows},
        }

        def write() -> None:
            check_averages(parts["ema"], step)
            save_checkpoint(folder, step, parts, facts, self.config.keep_checkpoints)

        on_main(self.accelerator, write)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state under "<parameter index>.<key>"; every process must call it."""
        return optimizer_tensors(self.optimizer)

    def load(self, checkpoint: Checkpoint, ema: Ema) -> None:
        """Restore what a checkpoint of any number of processes holds.

        Raises:
            InputError: when it does not fit the module.
        """
        load_checkpoint(checkpoint, self.bare, ema, self.optimizer)
