"""`mmdiff evaluate`: every direction of a model, every modality in it scored."""

from __future__ import annotations

import itertools
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from mmdiff.build import state_law
from mmdiff.conditioning import feed_for
from mmdiff.config import Config
from mmdiff.data import Table
from mmdiff.evaluation import metrics
from mmdiff.evaluation.features import distances, extractor
from mmdiff.evaluation.judges import complete, find_judge
from mmdiff.evaluation.restored import HoleScores
from mmdiff.evaluation.scores import scorer
from mmdiff.evaluation.zero_shot import ZeroShot
from mmdiff.modalities import Label
from mmdiff.pipeline import MTDiffusionPipeline

PICTURED = 8  # rows of a picture


@dataclass
class Row:
    """One line of the table: ``direction`` ("joint", "label → image", …), ``of`` whose values are scored, ``setting``
    (aggregate, steps, seed …) and the scores by name."""

    direction: str
    of: str
    setting: dict[str, Any]
    scores: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evaluation:
    """What `evaluate` returns and `evaluation.json` holds; ``pictures`` {name: rows of images side by side}."""

    manifest: dict[str, Any]
    rows: list[Row]
    pictures: dict[str, list[list[PILImage.Image]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return {"manifest": self.manifest, "rows": [vars(row) for row in self.rows]}


def evaluate(
    pipeline: MTDiffusionPipeline,
    config: Config,
    train: Table,
    validation: Table,
    steps: tuple[int, ...] | None = None,
    feed: str | None = None,
    trust_custom_modalities: bool = False,
) -> Evaluation:
    """Score every direction: joint, each modality → anchor, anchor → each modality.

    Args:
        pipeline: the model; its scheduler's solver is used.
        config: the run's; `evaluate.*` and `sample.*` count.
        train, validation: real rows; judges and features are fitted on training rows only.
        steps: numbers of solver steps to compare; default `sample.steps`.
        feed: see the pipeline; default `sample.feed`.
        trust_custom_modalities: of runs that serve as judges.
    """
    pipeline.set_progress_bar_config(disable=True)
    scene = Scene(pipeline, config, train, validation, trust_custom_modalities)
    rows = list(scene.reads()) if state_law(config, config.anchor).observed > 0 else []
    for count in steps or (config.sample.steps,):
        for seed in config.evaluate.seeds:
            for row in scene.samples(count, seed, feed or config.sample.feed):
                row.setting |= {"steps": count, "seed": seed}
                rows.append(row)
    facts = scene.facts | {"feed": feed_for(feed or config.sample.feed, pipeline.scheduler.is_stochastic)}
    return Evaluation(manifest(pipeline, config, train, validation) | facts, rows, scene.pictures)


class Scene:
    """A model, its real rows, and all that is fitted to them once.

    Args:
        pipeline, config, train, validation, trust: see `evaluate`.
    """

    def __init__(
        self, pipeline: MTDiffusionPipeline, config: Config, train: Table, validation: Table, trust: bool
    ) -> None:
        self.pipeline, self.config, self.model = pipeline, config, pipeline.model
        self.anchor = self.model.anchor
        limit = config.evaluate.max_rows
        real, self.held_out = train.all(limit), validation.all(limit)
        (images,) = complete(real, self.anchor)
        self.extractor = extractor(config.evaluate.features, images)
        self.features = self.extractor(images)
        self.memory = metrics.Memory(images.numpy(), complete(self.held_out, self.anchor)[0].numpy())
        modalities = self.model.modalities
        self.read_out = [n for n in self.model.auxiliary if scorer(modalities[n]) and not modalities[n].predicts_anchor]
        self.judges = {
            name: judge
            for name in self.read_out
            if (judge := find_judge(config, self.model, name, real, trust)) is not None
        }
        self.restoring = [n for n in self.model.auxiliary if modalities[n].predicts_anchor]
        self.facts: dict[str, Any] = {"FID and KID features": self.extractor.name}
        self.pictures: dict[str, list[list[PILImage.Image]]] = {}
        self._judge_the_judges()
        if self.restoring:
            self.holes = HoleScores(config, validation, self.anchor)
            self.facts |= self.holes.facts

    def _judge_the_judges(self) -> None:
        for name, judge in self.judges.items():
            images, truth = complete(self.held_out, self.anchor, name)
            scores = scorer(self.model.modalities[name])(self.model.modalities[name], judge.read(images), truth)
            self.facts |= {f"{name} judge": judge.name, f"{name} judge, on held-out rows": _numbers(scores)}

    # ---------------------------------------------------------------------------------------------- anchor → the rest

    def reads(self) -> Iterator[Row]:
        """anchor → each modality on the held-out rows, in one network evaluation; and the CLIP baseline of labels."""
        for name in self.read_out:
            modality = self.model.modalities[name]
            images, truth = complete(self.held_out, self.anchor, name)
            found = self._draw(len(images), 0, observed={self.anchor: images})[name]
            yield Row(
                f"{self.anchor} → {name}", name, {}, {"n": len(images)} | scorer(modality)(modality, found, truth)
            )
            chosen = _spread(len(images))
            shown = [modality.postprocess(values[chosen]) for values in (truth, found)]
            if isinstance(shown[0][0], PILImage.Image):  # image, truth, what was read
                pictures = self.model.modalities[self.anchor].postprocess(images[chosen])
                self.pictures[name] = [list(row) for row in zip(pictures, *shown, strict=True)]
            if isinstance(modality, Label) and self.config.evaluate.zero_shot is not None:
                yield self._zero_shot(name, images, truth)

    def _zero_shot(self, name: str, images: Tensor, truth: Tensor) -> Row:
        settings = self.config.evaluate.zero_shot
        names = settings.names or self.model.modalities[name].names
        baseline = ZeroShot(settings.model, settings.pretrained, names, settings.template)
        scores = metrics.classification(baseline(images), truth, self.model.modalities[name].num_classes)
        return Row(f"{self.anchor} → {name}", name, {"by": baseline.name}, {"n": len(images)} | scores)

    # --------------------------------------------------------------------------------------------- the rest → anchor

    def samples(self, steps: int, seed: int, feed: str | None) -> Iterator[Row]:
        """Joint samples and each modality → anchor, with and without aggregating."""
        arguments = {"num_inference_steps": steps, "feed": feed}
        weighted = {name for name, peak in self.pipeline.peak_weights().items() if peak > 0}
        count = self.config.evaluate.num_samples
        if state_law(self.config, self.anchor).observed == 1:  # a reader only
            return
        denoises = self.config.states.anchor_hidden < 1
        for aggregate in (True, False)[not weighted :] if denoises else ():
            setting = {"aggregate": aggregate}
            yield from self._scored("joint", setting, self._draw(count, seed, aggregate=aggregate, **arguments), {})
            for name in self.read_out:
                given = self._given(name, count)
                drawn = self._draw(count, seed, aggregate=aggregate, observed={name: given}, **arguments)
                yield from self._scored(f"{name} → {self.anchor}", setting, drawn, {name: given})
        for name in self.restoring:
            yield from self._restored(name, seed, arguments)

    def _restored(self, name: str, seed: int, arguments: dict[str, Any]) -> Iterator[Row]:
        """masked image → anchor, every way and every set of masks; the picture is of the last set."""
        shown: dict[str, list[PILImage.Image]] = {}
        image, masked = self.model.modalities[self.anchor], self.model.modalities[name]
        ways = self.holes.ways(name, lambda count, **more: self._draw(count, seed, **arguments | more))
        for setting, value, known, restored in ways:
            yield Row(f"{name} → {self.anchor}", self.anchor, setting, self.holes.scores(restored, known))
            chosen = _spread(len(value))
            shown["truth"] = image.postprocess(self.holes.truth[chosen])
            shown["masked"] = [_on_grey(picture) for picture in masked.postprocess(value[chosen])]
            shown[setting["by"]] = image.postprocess(restored[chosen])
        self.pictures[name] = [list(row) for row in zip(*shown.values(), strict=True)]

    def _given(self, name: str, count: int) -> Tensor:
        """Values to condition on: the gallery's in turn where there is one, else those of held-out rows."""
        gallery = self.model.modalities[name].gallery()
        values = complete(self.held_out, name)[0] if gallery is None else gallery
        return values[torch.arange(count) % len(values)]

    def _scored(
        self, direction: str, setting: dict, drawn: dict[str, Tensor], given: dict[str, Tensor]
    ) -> Iterator[Row]:
        """The images by themselves, and each modality that a judge can read off them against the model's own value."""
        images = drawn[self.anchor].float()
        yield Row(direction, self.anchor, dict(setting), {"n": len(images)} | self._image_scores(images))
        for name, judge in self.judges.items():
            modality, judged = self.model.modalities[name], judge.read(images)
            found = scorer(modality)(modality, judged, given.get(name, drawn[name]))
            # no truth is at hand: the judge and the model agree or not
            scores = {"n": len(images)} | {key.replace("accuracy", "agreement"): x for key, x in found.items()}
            if f"{name}/last" in drawn and name not in given:
                last = scorer(modality)(modality, judged, drawn[f"{name}/last"])
                scores["of last draw"] = next(iter(last.values()))
            if isinstance(modality, Label):
                scores["class shares"] = metrics.class_shares(judged.numpy(), modality.num_classes)
            yield Row(direction, name, dict(setting), scores)

    def _image_scores(self, images: Tensor) -> dict[str, Any]:
        return distances(self.extractor(images), self.features) | {
            "memorised": self.memory.share(images.numpy()),
            "memorised, expected": metrics.MEMORISED_EXPECTED,
            "std over samples": float(images.std(dim=0).mean()),
        }

    def _draw(self, count: int, seed: int, **arguments: Any) -> dict[str, Tensor]:
        sample = self.config.sample
        given = set(arguments.get("observed", {})) - {self.anchor}
        scale = sample.guidance_scale if given and self.anchor not in arguments["observed"] else 1.0
        return draw(self.pipeline, count, sample.batch_size, seed, guidance_scale=scale, **arguments)


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


def manifest(pipeline: MTDiffusionPipeline, config: Config, train: Table, validation: Table) -> dict[str, Any]:
    """What a reader needs to believe a number, and to make it again."""
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["mmdiff", *sys.argv[1:]]),
        "machine": f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads, {pipeline.device}",
        "torch": torch.__version__,
        "data": config.data.source,
        "training rows": len(train),
        "held-out rows": len(validation),
        "real rows used": config.evaluate.max_rows,
        "samples": config.evaluate.num_samples,
        "seeds": config.evaluate.seeds,
        "solver": pipeline.scheduler.config.solver,
        "guidance_scale": config.sample.guidance_scale,
    }


def table(evaluation: Evaluation) -> str:
    """The evaluation as text, seeds averaged."""
    groups: dict[tuple, list[Row]] = {}
    for row in evaluation.rows:
        key = (row.direction, row.of, *(f"{k}={v}" for k, v in row.setting.items() if k != "seed"))
        groups.setdefault(key, []).append(row)
    lines = [f"{k}: {v}" for k, v in evaluation.manifest.items()]
    for (direction, of, *setting), rows in groups.items():
        lines.append(f"\n{direction}: {of}  ({', '.join([*setting, f'{len(rows)} seed' + 's' * (len(rows) > 1)])})")
        for name in rows[0].scores:
            if not name.endswith(", 95 %"):
                between = _interval([row.scores.get(f"{name}, 95 %") for row in rows])
                lines.append(f"  {name:<24}{_cell([row.scores[name] for row in rows])}{between}")
    return "\n".join(lines)


def save(evaluation: Evaluation, path: Path) -> None:
    """Write evaluation.json; an earlier one is kept under a number."""
    if path.exists():
        numbers = (path.with_stem(f"{path.stem}-{k}") for k in itertools.count(1))
        path.rename(next(candidate for candidate in numbers if not candidate.exists()))
    path.write_text(json.dumps(evaluation.to_json(), indent=1, ensure_ascii=False) + "\n")


def _spread(count: int) -> Tensor:
    """Rows for a picture, evenly spread: neighbouring rows of a data set are often alike."""
    return torch.linspace(0, count - 1, min(count, PICTURED)).round().long()


def _on_grey(picture: PILImage.Image) -> PILImage.Image:
    """A picture with an alpha channel, its holes grey."""
    ground = PILImage.new("RGBA", picture.size, (128, 128, 128, 255))
    return PILImage.alpha_composite(ground, picture.convert("RGBA")).convert(picture.mode.removesuffix("A"))


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """Without intervals and lists, to four digits."""
    return {name: round(value, 4) for name, value in scores.items() if isinstance(value, float)}


def _interval(values: list[Any]) -> str:
    """Mean ends of the seeds' intervals."""
    if values[0] is None:
        return ""
    low, high = np.mean(values, axis=0)
    return f"  [{low:.3f}, {high:.3f}]"


def _cell(values: list[Any]) -> str:
    mean = np.mean(np.asarray(values, dtype=np.float64), axis=0)
    if mean.ndim:
        return " ".join(f"{v:.3f}" for v in mean)
    spread = f"  (seeds {min(values):.3f} … {max(values):.3f})" if len(values) > 1 else ""
    return f"{mean:.3f}{spread}"
