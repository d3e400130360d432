"""Two steps of an experiment on random stand-in data: does it run, and what does it cost?"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmdiff.build import build_stand_in
from mmdiff.config import Config
from mmdiff.training.launcher import obey_launcher
from mmdiff.training.memory import kept_per_image, state_of, table
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
    experiment = build_stand_in(config)
    experiment.objective.to(accelerator.device)
    each = config.train.batch_size // (accelerator.num_processes * config.train.accumulate)
    per_image, fixed = kept_per_image(experiment, accelerator, max(1, min(each, 4)))
    parameters = sum(p.numel() for p in experiment.objective.parameters())
    state = state_of(experiment.objective, 0, 0)  # while the weights are whole
    trainer = Trainer(experiment, accelerator)
    trainer.prepare()
    batches, window = trainer.loader(0), Window()
    flops = FlopCounterMode(display=False)
    with flops:
        window.add(trainer.step(*next(batches)))
    started = time.perf_counter()
    for _ in range(1, steps):
        window.add(trainer.step(*next(batches)))
    check_finite(window.rows(accelerator), window.names, steps, config.train)
    seconds = (time.perf_counter() - started) / (steps - 1)
    batches.close()
    trained = sum(p.numel() for p in trainer.ema.parameters.values())  # all but what lies under LoRA layers
    total = flops.get_total_flops() * accelerator.num_processes
    lines = [
        f"dry run: {steps} steps on stand-in data, {accelerator.num_processes} processes, {accelerator.device}",
        f"parameters          {parameters:,}",
        *([f"                    {trained:,} of them are trained"] if trained < parameters else []),
        f"bytes per device    {_gib(trained * STATE_BYTES + (parameters - trained) * 4)} weights, gradients, Adam, EMA "
        "(float32)",
        f"                    {_gib(per_image * each + fixed)} kept for the backward pass of {each} samples",
        f"                    {per_image / 2**20:.3g} MiB per image and {fixed / 2**20:.3g} MiB for any batch",
        f"FLOPs per step      {total:.3g} for {config.train.batch_size} samples, {config.train.accumulate} parts",
        f"seconds per step    {seconds:.2f}",
    ]
    if accelerator.device.type == "cuda":
        lines.append(f"peak memory         {_gib(torch.cuda.max_memory_allocated())} allocated")
    moments, averages = _moments(trainer), sum(a.numel() for kept in trainer.ema.kept.values() for a in kept.values())
    return "\n".join([*lines, *table(replace(state, moments=moments, averages=averages), accelerator.num_processes)])


def _moments(trainer: Trainer) -> int:
    """Numbers that the optimizer keeps, on all processes together."""
    return sum(tensor.numel() for tensor in trainer.parallel.optimizer_tensors().values() if tensor.ndim)


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
