"""Two steps of an experiment on random stand-in data: does it run, and what does it cost?"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mmdiff.build import build_stand_in
from mmdiff.config import Config
from mmdiff.training.launcher import obey_launcher
from mmdiff.training.process import make_accelerator, set_threads
from mmdiff.training.tracking import Window
from mmdiff.training.trainer import Trainer, check_finite

STATE_BYTES = 4 + 4 + 8 + 4  # per parameter, float32: weight, gradient, Adam's two moments, EMA


def dry_run(config: Config, steps: int = 2) -> str:
    """Train a few steps without data, and say what one costs.

    Args:
        config: of the experiment; nothing is opened and nothing written.
        steps: at least 2: the first is counted, the rest are timed.

    Raises:
        InputError: when a setting is missing that only the data would determine.
        TrainingError: on a non-finite term.
    """
    config = obey_launcher(config)
    set_threads(config.train.threads)
    accelerator = make_accelerator(config.train)
    config = config.model_copy(
        update={
            "train": config.train.model_copy(update={"steps": max(steps, config.train.steps)}),
            "data": config.data.model_copy(update={"workers": 0}),
        }
    )
    trainer = Trainer(build_stand_in(config), accelerator)
    batches, window = trainer.loader(0), Window()
    flops, activations = FlopCounterMode(display=False), _SavedBytes(trainer)
    with flops, saved_tensors_hooks(activations.keep, activations.give):
        window.add(trainer.step(*next(batches)))
    started = time.perf_counter()
    for _ in range(1, steps):
        window.add(trainer.step(*next(batches)))
    check_finite(window.rows(accelerator), window.names, steps, config.train)
    seconds = (time.perf_counter() - started) / (steps - 1)
    batches.close()
    parameters = sum(p.numel() for p in trainer.bare.parameters())
    trained = sum(p.numel() for p in trainer.ema.parameters.values())  # all but what lies under LoRA layers
    each = config.train.batch_size // (accelerator.num_processes * config.train.accumulate)
    total = flops.get_total_flops() * accelerator.num_processes
    lines = [
        f"dry run: {steps} steps on stand-in data, {accelerator.num_processes} processes, {accelerator.device}",
        f"parameters          {parameters:,}",
        *([f"                    {trained:,} of them are trained"] if trained < parameters else []),
        f"bytes per device    {_gib(trained * STATE_BYTES + (parameters - trained) * 4)} weights, gradients, Adam, EMA "
        "(float32)",
        f"                    {_gib(activations.bytes)} kept for the backward pass of {each} samples",
        f"FLOPs per step      {total:.3g} for {config.train.batch_size} samples, {config.train.accumulate} parts",
        f"seconds per step    {seconds:.2f}",
    ]
    if accelerator.device.type == "cuda":
        lines.append(f"peak memory         {_gib(torch.cuda.max_memory_allocated())} allocated")
    return "\n".join(lines)


class _SavedBytes:
    """Adds up what autograd keeps: every storage once, parameters not at all; ``bytes`` is the largest part's."""

    def __init__(self, trainer: Trainer) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in trainer.bare.parameters()}
        self._seen: set[int] = set()
        self._part, self._over, self.bytes = 0, True, 0

    def keep(self, tensor: Tensor) -> Tensor:
        """In the forward pass."""
        if self._over:  # the part before this one has gone backward
            self._seen, self._part, self._over = set(self._parameters), 0, False
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._part += storage.nbytes()
            self.bytes = max(self.bytes, self._part)
        return tensor

    def give(self, tensor: Tensor) -> Tensor:
        """In the backward pass."""
        self._over = True
        return tensor


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
