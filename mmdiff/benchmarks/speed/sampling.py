"""What a sampling step costs outside of the network and beyond the solver's own step."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor

from mmdiff.build import build
from mmdiff.config import Config
from mmdiff.pipeline import MTDiffusionPipeline


def sampling(config: Config, rounds: int, steps: int, hub: bool) -> dict[str, SamplerOverhead]:
    """Of joint samples, and of samples given every other modality."""
    experiment = build(config, hub)
    pipeline = MTDiffusionPipeline(model=experiment.model.eval(), scheduler=experiment.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    size, model = config.train.batch_size, experiment.model
    rows = experiment.validation.all(size).values
    given = {name: rows[name][torch.arange(size) % len(rows[name])] for name in model.auxiliary}
    return {
        title: sampler_overhead(pipeline, size, observed, rounds, steps)
        for title, observed in (("joint", {}), ("given the rest", given))
    }


class SamplerOverhead(NamedTuple):
    """Seconds of CPU time per step: all of the ``loop``, ``network``, the bare diffusers ``solver``, what is left."""

    loop: float
    network: float
    solver: float
    overhead: float


def sampler_overhead(
    pipeline: MTDiffusionPipeline, size: int, observed: dict[str, Tensor], rounds: int, steps: int
) -> SamplerOverhead:
    """What a sampling step costs outside of the network and beyond the solver's own step.

    Runs of ``steps`` and of 2 · ``steps`` steps are timed, so that what is done once per call falls out, as does the
    final read.

    Args:
        pipeline: on the CPU, with one thread: only the calling one's time is counted.
        size: of the batch.
        observed: values, see the pipeline.
        rounds: the medians are over these.
        steps: solver steps.
    """
    overheads = []
    for index in range(rounds + 1):
        once, twice = (_timed(pipeline, size, observed, count) for count in (steps, 2 * steps))
        loop, network = ((b - a) / steps for a, b in zip(once, twice, strict=True))
        solver = _bare_solver(pipeline, size, steps)
        if index > 0:  # the first round warms up
            overheads.append(SamplerOverhead(loop, network, solver, loop - network - solver))
    return SamplerOverhead(*map(statistics.median, zip(*overheads, strict=True)))


def _timed(pipeline: MTDiffusionPipeline, size: int, observed: dict[str, Tensor], steps: int) -> tuple[float, float]:
    """(seconds of a call, seconds of them in the network)."""
    starts, inside = [], []
    hooks = [
        pipeline.model.register_forward_pre_hook(lambda *_: starts.append(time.thread_time())),
        pipeline.model.register_forward_hook(lambda *_: inside.append(time.thread_time() - starts[-1])),
    ]
    start = time.thread_time()
    pipeline(size, observed, steps, generator=torch.Generator().manual_seed(0), output_type="pt", final_read=False)
    whole = time.thread_time() - start
    for hook in hooks:
        hook.remove()
    return whole, sum(inside)


def _bare_solver(pipeline: MTDiffusionPipeline, size: int, steps: int) -> float:
    """Seconds per step of the diffusers class alone, on tensors of the same shape."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    z = torch.randn(size, *pipeline.model.space)
    output = torch.randn_like(z)
    start = time.thread_time()
    for timestep in scheduler.steps[:-1]:
        z = scheduler.solver_step(output, timestep, z)
    return (time.thread_time() - start) / steps
