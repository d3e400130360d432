"""`mmdiff evaluate`: every direction of a model, scored; one evaluator per kind of auxiliary modality."""

from __future__ import annotations

import itertools
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdiff.conditioning import feed_for
from mmdiff.config import Config
from mmdiff.data import Batch, Table
from mmdiff.evaluation import metrics
from mmdiff.modalities import Label, Modality
from mmdiff.pipeline import MTDiffusionPipeline, MTDiffusionPipelineOutput

Sampler = Callable[..., MTDiffusionPipelineOutput]


@dataclass
class Row:
    """One line of the table: ``direction`` ("joint", "label → image", …), ``setting`` (solver, steps, feed, seed …)
    and the scores by name."""

    direction: str
    setting: dict[str, Any]
    scores: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evaluation:
    """What `evaluate` returns and `evaluation.json` holds."""

    manifest: dict[str, Any]
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return {"manifest": self.manifest, "rows": [vars(row) for row in self.rows]}


def draw(pipeline: MTDiffusionPipeline, count: int, batch_size: int, seed: int, **arguments: Any) -> dict[str, Tensor]:
    """``count`` samples in batches, as tensors on the CPU; last draws under "<name>/last"."""
    generator = torch.Generator().manual_seed(seed)
    observed = arguments.pop("observed", {})
    parts: list[dict[str, Tensor]] = []
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        output = pipeline(
            batch_size=size,
            observed={name: value[start : start + size] for name, value in observed.items()},
            generator=generator,
            output_type="pt",
            return_last_draws=True,
            **arguments,
        )
        last = {f"{name}/last": value for name, value in output.last_draws.items()}
        parts.append({name: value.cpu() for name, value in (output.samples | last).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class LabelEvaluator:
    """Agreement of images and a label, by a judge trained apart on the training rows.

    Args:
        name, modality: the label.
        anchor: name of the image.
        train, held_out: real rows; those that lack the image or the label take no part.
    """

    def __init__(self, name: str, modality: Label, anchor: str, train: Batch, held_out: Batch) -> None:
        self.name, self.anchor, self.num_classes = name, anchor, modality.num_classes
        images, labels = _complete(train, anchor, name)
        self.held_out, self.held_out_labels = _complete(held_out, anchor, name)
        self.judge = metrics.Judge(images.numpy(), labels.numpy())
        self.real = metrics.RealImages(images.numpy(), self.held_out.numpy())
        self.judge_accuracy = float((self.judge(self.held_out.numpy()) == self.held_out_labels.numpy()).mean())

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {f"{self.name} judge": "3-NN on training pixels", f"{self.name} judge accuracy": self.judge_accuracy}

    def run(self, sampler: Sampler, count: int, seed: int, aggregates: tuple[bool, ...]) -> Iterator[Row]:
        """Joint and label → image, with and without aggregating; image → label on the held-out rows."""
        given = torch.arange(count) % self.num_classes
        for aggregate in aggregates:
            samples = sampler(count, seed, aggregate=aggregate)
            yield Row("joint", {"aggregate": aggregate}, self._image_scores(samples, samples[self.name]))
            samples = sampler(count, seed, aggregate=aggregate, observed={self.name: given})
            yield Row(f"{self.name} → {self.anchor}", {"aggregate": aggregate}, self._image_scores(samples, given))
        read = sampler(len(self.held_out), seed, observed={self.anchor: self.held_out})[self.name]
        correct = (read == self.held_out_labels).numpy()
        yield Row(f"{self.anchor} → {self.name}", {}, _share("accuracy", correct))

    def _image_scores(self, samples: dict[str, Tensor], labels: Tensor) -> dict[str, Any]:
        images = samples[self.anchor].float().numpy()
        judged = self.judge(images)
        distance, floor = self.real.frechet_distance(images)
        scores = _share("agreement", judged == labels.numpy())
        if f"{self.name}/last" in samples:
            scores["agreement of last draw"] = float((judged == samples[f"{self.name}/last"].numpy()).mean())
        return scores | {
            "Fréchet distance": distance,
            "floor": floor,
            "memorised": self.real.memorised_share(images),
            "memorised, expected": metrics.MEMORISED_EXPECTED,
            "class shares": metrics.class_shares(judged, self.num_classes),
            "std over samples": float(images.std(axis=0).mean()),
        }


EVALUATORS: dict[type[Modality], type[LabelEvaluator]] = {Label: LabelEvaluator}


def evaluate(
    pipeline: MTDiffusionPipeline,
    config: Config,
    train: Table,
    validation: Table,
    steps: tuple[int, ...] | None = None,
    feed: str | None = None,
) -> Evaluation:
    """Score every direction that an evaluator knows.

    Args:
        pipeline: the model; its scheduler's solver is used.
        config: the run's; `evaluate.num_samples`, `evaluate.seeds` and `sample.*` count.
        train, validation: real rows; the training rows fit judges and features.
        steps: numbers of solver steps to compare; default `sample.steps`.
        feed: see the pipeline; default `sample.feed`.
    """
    pipeline.set_progress_bar_config(disable=True)
    real, held_out = train.all(), validation.all()
    evaluators = [
        EVALUATORS[type(pipeline.model.modalities[name])](
            name, pipeline.model.modalities[name], pipeline.model.anchor, real, held_out
        )
        for name in pipeline.model.auxiliary
        if type(pipeline.model.modalities[name]) in EVALUATORS
    ]
    weighted = any(peak > 0 for peak in pipeline.peak_weights().values())
    rows = []
    for count in steps or (config.sample.steps,):
        for seed in config.evaluate.seeds:

            def sampler(n: int, seed: int, *, count: int = count, **arguments: Any) -> dict[str, Tensor]:
                scale = config.sample.guidance_scale if config.anchor not in arguments.get("observed", {}) else 1.0
                arguments |= {"num_inference_steps": count, "guidance_scale": scale, "feed": feed or config.sample.feed}
                return draw(pipeline, n, config.sample.batch_size, seed, **arguments)

            for evaluator in evaluators:
                found = evaluator.run(
                    sampler, config.evaluate.num_samples, seed, (True, False) if weighted else (False,)
                )
                for row in found:
                    row.setting |= {"steps": count, "seed": seed}
                    rows.append(row)
    facts = {key: value for evaluator in evaluators for key, value in evaluator.facts().items()}
    facts["feed"] = feed_for(feed or config.sample.feed, pipeline.scheduler.is_stochastic)
    return Evaluation(manifest(pipeline, config, train, validation) | facts, rows)


def manifest(pipeline: MTDiffusionPipeline, config: Config, train: Table, validation: Table) -> dict[str, Any]:
    """What a reader needs to believe a number, and to make it again."""
    return {
        "date": date.today().isoformat(),
        "command": " ".join(Path(arg).name if i == 0 else arg for i, arg in enumerate(sys.argv)),
        "machine": f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads, {pipeline.device}",
        "torch": torch.__version__,
        "data": config.data.source,
        "training rows": len(train),
        "held-out rows": len(validation),
        "samples": config.evaluate.num_samples,
        "seeds": config.evaluate.seeds,
        "solver": pipeline.scheduler.config.solver,
        "guidance_scale": config.sample.guidance_scale,
    }


def table(evaluation: Evaluation) -> str:
    """The evaluation as text, seeds averaged."""
    groups: dict[tuple, list[Row]] = {}
    for row in evaluation.rows:
        key = (row.direction, *(f"{k}={v}" for k, v in row.setting.items() if k != "seed"))
        groups.setdefault(key, []).append(row)
    lines = [f"{k}: {v}" for k, v in evaluation.manifest.items()]
    for (direction, *setting), rows in groups.items():
        lines.append(f"\n{direction}  ({', '.join(setting)}; {len(rows)} seed{'s' * (len(rows) > 1)})")
        for name in rows[0].scores:
            lines.append(f"  {name:<24}{_cell([row.scores[name] for row in rows])}")
    return "\n".join(lines)


def save(evaluation: Evaluation, path: Path) -> None:
    """Write evaluation.json; an earlier one is kept under a number."""
    if path.exists():
        numbers = (path.with_stem(f"{path.stem}-{k}") for k in itertools.count(1))
        path.rename(next(candidate for candidate in numbers if not candidate.exists()))
    path.write_text(json.dumps(evaluation.to_json(), indent=1, ensure_ascii=False) + "\n")


def _complete(rows: Batch, *names: str) -> tuple[Tensor, ...]:
    """The values of the rows in which none of the named modalities is missing."""
    present = torch.stack([rows.present[name] for name in names]).all(dim=0)
    return tuple(rows.values[name][present] for name in names)


def _share(name: str, correct: np.ndarray) -> dict[str, Any]:
    return {name: float(correct.mean()), f"{name}, 95 %": list(metrics.interval(correct))}


def _cell(values: list[Any]) -> str:
    mean = np.mean(np.asarray(values, dtype=np.float64), axis=0)
    if mean.ndim:
        return " ".join(f"{v:.3f}" for v in mean)
    spread = f"  (seeds {min(values):.3f} … {max(values):.3f})" if len(values) > 1 else ""
    return f"{mean:.3f}{spread}"
