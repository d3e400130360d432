"""What the framework costs: a training step against a bare PyTorch loop, a sampling step against the bare solver."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import NamedTuple

import torch
from torch import Tensor

from mmdiff.backbones import Observation
from mmdiff.build import Experiment, build
from mmdiff.config import Config
from mmdiff.errors import InputError
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.training.process import make_accelerator, set_threads
from mmdiff.training.trainer import Trainer
from mmdiff.trust import refuse_custom


@dataclass(frozen=True)
class Request:
    """What is timed.

    Attributes:
        config: of the experiment.
        rounds, steps: rounds of that many steps of each side.
        against: the other side: "bare", a hand-written loop of an ordinary diffusion with the same backbone, or
            "anchor", the same experiment without its other modalities. "solver" measures sampling, see
            `sampler_overhead`.
        trust: whether the config may name code and contact the hub.
    """

    config: Config
    rounds: int = 5
    steps: int = 10
    against: str = "bare"
    trust: bool = False


def run(request: Request) -> str:
    """Milliseconds of CPU time per step of both sides and their ratio; the sides take turns.

    One side is `Trainer.step`: data, states, encoders, heads, the loss, Accelerate, clipping, EMA.

    Raises:
        InputError: the config names code that is not trusted, or the other side is unknown.
    """
    config, rounds, steps, against = request.config, request.rounds, request.steps, request.against
    if against not in ("bare", "anchor", "solver"):
        raise InputError("--against", against, "choose bare, anchor or solver")
    if not request.trust:
        refuse_custom(config.model_dump()["modalities"])
    set_threads(config.train.threads)
    hub = request.trust
    if against == "solver":
        return _sampling(config, rounds, steps, hub)
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": (rounds + 2) * steps})})
    framework = _framework(build(config, hub), config)
    if against == "anchor":
        alone = _anchor_alone(config)
        bare = _framework(build(alone, hub), alone)
    else:
        bare = _bare(build(config, hub), config)
    times: dict[str, list[float]] = {"mmdiff": [], against: []}
    for index in range(rounds + 1):
        # the order alternates, so that a drift of the machine's speed falls on both
        sides = [("mmdiff", framework), (against, bare)]
        for name, step in sides if index % 2 == 0 else reversed(sides):
            seconds = _cpu_seconds(step, steps)
            if index > 0:  # the first round warms up
                times[name].append(1000 * seconds / steps)
    ratios = [a / b for a, b in zip(times["mmdiff"], times[against], strict=True)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return "\n".join(
        [
            f"{date.today().isoformat()}, {platform.machine()}, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads, load {_load()}, batch {config.train.batch_size}, "
            f"{rounds} rounds × {steps} steps",
            *(f"{name:<8}{medians[name]:9.1f} ms CPU per step (median of {rounds})" for name in times),
            f"ratio   {statistics.median(ratios):9.3f}  (rounds {min(ratios):.3f} … {max(ratios):.3f})",
        ]
    )


def _sampling(config: Config, rounds: int, steps: int, hub: bool) -> str:
    """Joint samples and samples given every other modality, in microseconds per step and batch."""
    experiment = build(config, hub)
    pipeline = MTDiffusionPipeline(model=experiment.model.eval(), scheduler=experiment.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    size, model = config.train.batch_size, experiment.model
    rows = experiment.validation.all(size).values
    given = {name: rows[name][torch.arange(size) % len(rows[name])] for name in model.auxiliary}
    lines = [
        f"{date.today().isoformat()}, {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} "
        f"threads, load {_load()}, batch {size} of {tuple(model.space)}, {pipeline.scheduler.config.solver}, "
        f"CPU time, median of {rounds} rounds × {steps} steps"
    ]
    for title, observed in (("joint", {}), ("given the rest", given)):
        overhead = sampler_overhead(pipeline, size, observed, rounds, steps)
        text = ", ".join(f"{name} {1e6 * seconds:.0f} µs" for name, seconds in overhead._asdict().items())
        lines.append(f"{title}: {text} per step")
    return "\n".join(lines)


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


def _anchor_alone(config: Config) -> Config:
    data = config.data.model_copy(update={"masking": {}, "embeddings": {}, "missing": {}, "columns": {}})
    columns = {name: column for name, column in config.data.columns.items() if name == config.anchor}
    modalities = {config.anchor: config.modalities[config.anchor]}
    return config.model_copy(update={"data": data.model_copy(update={"columns": columns}), "modalities": modalities})


def _framework(experiment: Experiment, config: Config) -> Callable[[], None]:
    trainer = Trainer(experiment, make_accelerator(config.train))
    batches = trainer.loader(0)

    def step() -> None:
        trainer.step(*next(batches))

    return step


def _bare(experiment: Experiment, config: Config) -> Callable[[], None]:
    """The loop one would write by hand for an ordinary diffusion with the same network, AdamW and EMA."""
    backbone, settings = experiment.model.backbone, config.train
    parameters = list(backbone.parameters())
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    images = experiment.train.all().values[config.anchor]
    signal, sigma = (table.float()[:, None, None, None] for table in experiment.scheduler.path[:2])
    channels = sum(m.observation_channels for m in experiment.model.modalities.values())
    size = settings.batch_size
    observation = Observation(
        torch.zeros(size, channels, *images.shape[2:]),
        torch.zeros(size, sum(2 + m.context_width for m in experiment.model.modalities.values())),
    )

    def step() -> None:
        x = images[torch.randint(len(images), (size,))]
        noise, t = torch.randn_like(x), torch.randint(len(signal), (size,))
        prediction = backbone(signal[t] * x + sigma[t] * noise, t, observation).prediction
        torch.nn.functional.mse_loss(prediction, signal[t] * noise - sigma[t] * x).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - settings.ema_decay)

    return step


def _cpu_seconds(step: Callable[[], None], steps: int) -> float:
    start = time.process_time()
    for _ in range(steps):
        step()
    return time.process_time() - start


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"
