"""Variants of an experiment at one budget: training over several seeds, held-out loss by time, Fréchet distance."""

from __future__ import annotations

import json
import re
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from mmdiff import losses
from mmdiff.benchmarks.cache import key_of, stored_json
from mmdiff.benchmarks.machine import machine
from mmdiff.benchmarks.training import endless, steps
from mmdiff.build import Experiment, build
from mmdiff.config import Config, parse_config
from mmdiff.config.load import parse_overrides, read_plain
from mmdiff.errors import InputError, at
from mmdiff.evaluation.draws import draw
from mmdiff.evaluation.judges import complete
from mmdiff.metrics.features import distances, extractor
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.randomness import normal
from mmdiff.training.process import make_accelerator, set_threads
from mmdiff.training.trainer import Trainer
from mmdiff.trust import refuse_custom

_DRAWN = 0  # seed of the held-out noise and of the samples, the same for all


@dataclass(frozen=True)
class Request:
    """What is compared.

    Attributes:
        config, overrides: the experiment.
        variants: texts "NAME key=value …"; with another `backbone.kind` the file's settings of the backbone fall away.
        seeds: of training, 0 … seeds − 1.
        seconds: CPU time of a training; 0: `train.steps` steps.
        rows: held-out rows of the loss, and samples of the distance.
        bins: parts of the time axis.
        out: folder of finished parts and results; the same command continues there.
        trust: whether the config may name code and contact the hub.
    """

    config: Path
    overrides: tuple[str, ...]
    variants: tuple[str, ...]
    seeds: int = 3
    seconds: float = 0.0
    rows: int = 256
    bins: int = 5
    out: Path = Path("runs/variants")
    trust: bool = False


def run(request: Request) -> str:
    """Train what is not yet there, one after the other, and give the table; JSON and table are written after each.

    Raises:
        InputError: a variant is no valid experiment, or its learning rate depends on how many steps it will take.
    """
    configs = {name: _config(request, settings) for name, settings in _named(request.variants).items()}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    about = {
        **machine(),
        "experiment": str(request.config),
        "budget": f"{request.seconds:g} s of CPU time" if request.seconds else "train.steps",
        "held-out rows": request.rows,
        "variants": list(request.variants),
    }
    text = ""
    for seed in range(request.seeds):
        for name, config in configs.items():
            train = config.train.model_copy(update={"seed": seed})
            results[name].append(_stored(request, name, config.model_copy(update={"train": train})))
            text = _table(about, results)
            request.out.mkdir(parents=True, exist_ok=True)
            tree = about | {"results": results}
            (request.out / "variants.json").write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
            (request.out / "variants.txt").write_text(text + "\n")
    return text


def _named(variants: Sequence[str]) -> dict[str, list[str]]:
    """{name: overrides}."""
    named: dict[str, list[str]] = {}
    for text in variants:
        try:
            name, *settings = shlex.split(text)
        except ValueError:
            raise InputError("--variant", text, "write NAME key=value …, quotes in pairs") from None
        if not re.fullmatch(r"[\w.+-]+", name) or name in named:
            raise InputError("--variant", text, "begin with a name of its own: letters, digits, ., +, -")
        named[name] = settings
    return named


def _config(request: Request, settings: Sequence[str]) -> Config:
    """The experiment with a variant's settings."""
    tree = read_plain("config", request.config, [*request.overrides, *settings])
    own = [text for text in settings if text.startswith("backbone.")]
    if any(text.startswith("backbone.kind=") for text in own):
        tree["backbone"] = OmegaConf.to_container(parse_overrides(own))["backbone"]
    config = parse_config(tree)
    if request.seconds:
        config = endless(config)
    if not request.trust:
        refuse_custom(config.model_dump()["modalities"])
    return config


def _stored(request: Request, name: str, config: Config) -> dict[str, Any]:
    """The result of one training."""
    facts = {"config": config.model_dump(mode="json"), "seconds": request.seconds}
    facts |= {"rows": request.rows, "bins": request.bins}
    path = request.out / "parts" / f"{name}-seed{config.train.seed}-{key_of(facts)[:12]}.json"
    with at(f"--variant {name}"):
        return stored_json(path, lambda: _trained(request, config))


def _trained(request: Request, config: Config) -> dict[str, Any]:
    """Train one variant, and score its averaged weights."""
    set_threads(config.train.threads)
    experiment = build(config, request.trust)
    trainer = Trainer(experiment, make_accelerator(config.train))
    started = time.process_time()
    denoising = [terms["l1"] for terms in steps(trainer, request.seconds)]
    seconds = time.process_time() - started
    with trainer.averaged() as pipeline:
        scores = score(pipeline, experiment, request.rows, request.bins)
    curve = torch.stack(denoising).double()
    return {
        "parameters": sum(p.numel() for p in experiment.model.backbone.parameters()),
        "steps": len(curve),
        "seconds": seconds,
        "load": machine()["load"],
        "training": [part.mean().item() for part in curve.split(50)],
        **scores,
    }


@torch.no_grad()
def score(pipeline: MTDiffusionPipeline, experiment: Experiment, rows: int, bins: int) -> dict[str, Any]:
    """Held-out error of the prediction with nothing given, by time, and the Fréchet distance of samples.

    Args:
        pipeline: with the weights to score.
        experiment: its data.
        rows: held-out rows, and samples.
        bins: equal parts of 0 … T; in each all rows have times that are evenly spread in it, and noise that is the same
            for every model.
    """
    model, scheduler = pipeline.model.eval(), pipeline.scheduler
    anchor, config = model.modalities[model.anchor], experiment.config
    (held_out,) = complete(experiment.validation.all(rows), model.anchor)
    z_0, positions = anchor.encode(held_out), torch.arange(len(held_out))
    by_bin = []
    for index in range(bins):
        u = (index + (positions.double() + 0.5) / len(positions)) / bins
        total, first = len(scheduler), scheduler.first_timestep
        timesteps = (u * total).floor().long() + first
        noise = normal(_DRAWN, index, "held-out", positions, z_0.shape[1:])
        z_t, target = scheduler.add_noise(z_0, noise, timesteps), scheduler.training_target(z_0, noise, timesteps)
        errors = []
        for part in torch.arange(len(z_0)).split(config.sample.batch_size):
            output = model(z_t[part], timesteps[part], model.observation({}, {}, {}, like=z_t[part]))
            errors.append(losses.denoising_error(output.prediction, target[part], None))
        by_bin.append(torch.cat(errors).mean().item())
    (real,) = complete(experiment.train.all(4 * rows), model.anchor)
    features = extractor("pixels", real)
    drawn = draw(
        pipeline, rows, config.sample.batch_size, _DRAWN, num_inference_steps=config.sample.steps, final_read=False
    )
    distance = distances(features(drawn[model.anchor]), features(real))
    return {
        "held-out loss": statistics.mean(by_bin),
        "by time": by_bin,
        "FD": distance["FID"],
        "FD, real against real": distance["FID, real against real"],
    }


def _table(about: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> str:
    """One row per variant: means over the seeds that are done, and their range."""
    done = {name: rows for name, rows in results.items() if rows}
    width = max(len(name) for name in done)
    header = f"{'variant':<{width}}  seeds  million  steps  ms CPU/step  {'held-out loss':<24}  {'FD':<22}  by time"
    lines = [", ".join(f"{key} {value}" for key, value in about.items() if key != "variants"), header]
    for name, rows in done.items():
        first = rows[0]
        steps = statistics.mean(row["steps"] for row in rows)
        cost = statistics.median(1000 * row["seconds"] / row["steps"] for row in rows)
        times = [statistics.mean(values) for values in zip(*(row["by time"] for row in rows), strict=True)]
        loss, distance = (
            _spread([row[key] for row in rows], digits) for key, digits in (("held-out loss", 4), ("FD", 2))
        )
        lines.append(
            f"{name:<{width}}  {len(rows):5}  {first['parameters'] / 1e6:7.3f}  {steps:5.0f}  {cost:11.1f}  "
            f"{loss:<24}  {distance:<22}  {' '.join(f'{value:.3f}' for value in times)}"
        )
    real = statistics.mean(row["FD, real against real"] for rows in done.values() for row in rows)
    return "\n".join([*lines, f"FD, real against real: {real:.2f}; mean (range of the seeds)"])


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"
