"""Every direction of a model: its values are drawn, and every modality in them is scored."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor

from mmdiff.build import state_probabilities
from mmdiff.config import Config
from mmdiff.data import WHOLE, Table
from mmdiff.errors import InputError
from mmdiff.evaluation.draws import draw, on_grey, pictured, read_params
from mmdiff.evaluation.holes import UNDRAWN, HoleScores
from mmdiff.evaluation.judges import complete, find_judge
from mmdiff.evaluation.report import Row
from mmdiff.evaluation.scorers import likelihood, scorer
from mmdiff.grids import is_map
from mmdiff.metrics.bootstrap import scored
from mmdiff.metrics.classification import class_shares, classification
from mmdiff.metrics.clip_zero_shot import ZeroShot
from mmdiff.metrics.features import distances, extractor
from mmdiff.metrics.image import spread
from mmdiff.metrics.neighbours import MEMORISED_EXPECTED, MemorisationTest
from mmdiff.modalities import Label, Mask
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.sampling.conditioning import methods_of_text, usable_methods


class Evaluator:
    """A model, its real rows, and all that is fitted to them once.

    Args:
        pipeline, config, train, validation, trust, conditioning: see `evaluate`.
    """

    def __init__(
        self,
        pipeline: MTDiffusionPipeline,
        config: Config,
        train: Table,
        validation: Table,
        trust: bool,
        conditioning: Iterable[str] = (),
    ) -> None:
        self.pipeline, self.config, self.model = pipeline, config, pipeline.model
        self.anchor = self.model.anchor
        real, self.held_out = (table.all(config.evaluate.max_rows) for table in (train, validation))
        (images,) = complete(real, self.anchor)
        self.extractor = extractor(config.evaluate.features, images)
        self.features = self.extractor(images)
        self.memorisation = MemorisationTest(images.numpy(), complete(self.held_out, self.anchor)[0].numpy())
        modalities = self.model.modalities
        self.read_out = [n for n in self.model.auxiliary if scorer(modalities[n]) and n not in self.model.filling]
        judges = {name: find_judge(config, self.model, name, real, trust) for name in self.read_out}
        self.judges = {name: judge for name, judge in judges.items() if judge is not None}
        self.filled_by = self.model.filling
        self.conditions = [n for n in self.model.auxiliary if n not in self.model.generated]
        used = {"training": len(images), "held out": int(self.held_out.present[self.anchor].sum())}
        self.facts: dict[str, Any] = {"real rows used": used, "FID and KID features": self.extractor.name}
        self.pictures: dict[str, dict[str, list[Any]]] = {}
        self._columns: dict[str, dict[str, list[PILImage.Image]]] = {}
        self.conditioning = self._usable(conditioning)
        self.validation = validation
        self._judge_the_judges()

    @cached_property
    def holes(self) -> HoleScores:
        """Made when first needed: LPIPS looks for weights."""
        holes = HoleScores(self.config, self.validation, self.anchor)
        self.facts |= holes.facts
        return holes

    def _usable(self, conditioning: Iterable[str]) -> dict[str, list[str]]:
        """{modality: the ways to compare that it can use}; a way that none can use is refused."""
        names = [*self.read_out, *self.filled_by]
        able = {name: usable_methods(self.model, name, self._weighted()) for name in names}
        usable = {name: [method for method in conditioning if methods_of_text(method) <= able[name]] for name in names}
        for method in conditioning:
            if not any(method in methods for methods in usable.values()):
                raise InputError(
                    "--conditioning", method, f"none of {', '.join(names) or 'no modality'} can use it here"
                )
        return usable

    def _weighted(self) -> set[str]:
        return {name for name, peak in self.pipeline.peak_weights().items() if peak > 0}

    def _judge_the_judges(self) -> None:
        for name, judge in self.judges.items():
            images, truth = complete(self.held_out, self.anchor, name)
            scores = scorer(self.model.modalities[name])(self.model.modalities[name], judge.read(images), truth)
            self.facts |= {f"{name} judge": judge.name, f"{name} judge, on held-out rows": _numbers(scores)}

    # ---------------------------------------------------------------------------------------------- anchor → the rest

    def reads(self) -> Iterator[Row]:
        """anchor → each modality on the held-out rows, in one network evaluation; diffused ones also by their own
        process; and the CLIP baseline of labels."""
        given = {"num_inference_steps": self.config.sample.steps}
        for name in self.read_out:
            modality = self.model.modalities[name]
            images, truth = complete(self.held_out, self.anchor, name)
            for setting in ({"read": "mode"}, {"read": "denoise"}) if name in self.model.gains else ({},):
                read = self._draw(len(images), 0, observed={self.anchor: images}, **given, **setting)[name]
                scores = scorer(modality)(modality, read, truth) | self._whole(name, read)
                scores = {"n": len(images)} | scores | self._likelihood(name, images, truth)
                yield Row(f"{self.anchor} → {name}", name, dict(setting), scores)
            chosen = pictured(len(images))
            columns = [modality.postprocess(values[chosen]) for values in (truth, read)]
            if isinstance(columns[0][0], PILImage.Image) or is_map(columns[0][0]):
                pictures = self.model.modalities[self.anchor].postprocess(images[chosen])
                self.pictures[name] = {self.anchor: pictures, "truth": columns[0], "read": columns[1]}
            if isinstance(modality, Label) and self.config.evaluate.zero_shot is not None:
                yield self._zero_shot(name, images, truth)

    def _likelihood(self, name: str, images: Tensor, truth: Tensor) -> dict[str, Any]:
        """How likely the true values are, for the kinds that report it."""
        scores = likelihood(self.model.modalities[name])
        if scores is None:
            return {}
        params = read_params(self.pipeline, name, images, self.config.sample.batch_size)
        return scores(self.model.modalities[name], params, truth)

    def _zero_shot(self, name: str, images: Tensor, truth: Tensor) -> Row:
        settings = self.config.evaluate.zero_shot
        names = settings.names or self.model.modalities[name].names
        baseline = ZeroShot(settings.model, settings.pretrained, names, settings.template)
        scores = classification(baseline(images), truth, self.model.modalities[name].num_classes)
        return Row(f"{self.anchor} → {name}", name, {"by": baseline.name}, {"n": len(images)} | scores)

    # --------------------------------------------------------------------------------------------- the rest → anchor

    def samples(self, steps: int, seed: int, feedback: str | None) -> Iterator[Row]:
        """Joint samples and each modality → anchor: with and without aggregating, or by each way of conditioning."""
        arguments = {"num_inference_steps": steps, "feedback": feedback}
        count, states = self.config.evaluate.num_samples, self.config.states
        if (
            state_probabilities(self.config, self.anchor).observed == 1 or states.anchor_hidden == 1
        ):  # nothing is denoised
            return
        aggregates = (True, False)[not self._weighted() :]
        for aggregate in aggregates:
            setting = {"aggregate": aggregate}
            yield from self._scored("joint", setting, self._draw(count, seed, aggregate=aggregate, **arguments), {})
        settings = {
            name: [{"conditioning": method} for method in methods] for name, methods in self.conditioning.items()
        }
        for name in self.read_out:
            condition = self._given(name, count)
            default = [{"aggregate": aggregate} for aggregate in aggregates]
            for setting in settings[name] or (default if not any(settings.values()) else []):
                drawn = self._draw(count, seed, observed={name: condition}, **_asked(setting), **arguments)
                yield from self._scored(f"{name} → {self.anchor}", setting, drawn, {name: condition})
        for name in self.conditions:
            yield from self._conditioned(name, count, seed, **arguments)
        for name in self.filled_by:
            for setting in settings[name] or ([{}] if not any(settings.values()) else []):
                yield from self._filled(name, seed, ("samples",), setting, **_asked(setting), **arguments)

    def _conditioned(self, name: str, count: int, seed: int, **arguments: Any) -> Iterator[Row]:
        """What only conditions → the rest, from held-out rows: what is drawn, and what judges read off the anchor,
        against the row's own values."""
        condition, *truths = complete(self.held_out, name, *self.read_out)
        chosen = torch.arange(count) % len(condition)
        drawn = self._draw(count, seed, observed={name: condition[chosen]}, **arguments)
        images, direction = drawn[self.anchor].float(), f"{name} → {self.anchor}"
        yield Row(direction, self.anchor, {}, {"n": count} | self._image_scores(images))
        for other, truth in zip(self.read_out, truths, strict=True):
            modality = self.model.modalities[other]
            if other in self.judges:
                scores = scorer(modality)(modality, self.judges[other].read(images), truth[chosen])
                yield Row(direction, other, {}, {"n": count} | scores)
            yield Row(
                f"{name} → {other}", other, {}, {"n": count} | scorer(modality)(modality, drawn[other], truth[chosen])
            )

    def subsets(self, steps: int, seed: int, feedback: str | None) -> Iterator[Row]:
        """Every non-empty proper subset of modalities observed, from held-out rows that have them all.

        A modality that is drawn is scored against its own row's value where the anchor is observed, and against what a
        judge reads off the generated anchor elsewhere; an observed one, too, against what the judge reads off: does the
        anchor show what was asked for?
        """
        names, count = self.model.names, self.config.evaluate.num_samples
        held_out = dict(zip(names, complete(self.held_out, *names), strict=True))
        chosen = torch.arange(count) % len(held_out[self.anchor])
        truth = {name: values[chosen] for name, values in held_out.items()}
        for size in range(1, len(names)):
            for observed in itertools.combinations(names, size):
                conditions = {name: truth[name] for name in observed}
                drawn = self._draw(count, seed, observed=conditions, num_inference_steps=steps, feedback=feedback)
                known, read = drawn | conditions, self.anchor in observed
                rest = " + ".join(name for name in names if name not in {*observed, *self.conditions})
                for name in sorted(set(self.read_out) - set(observed)) if read else self.judges:
                    pair = known[name], truth[name]
                    if not read:
                        pair = self.judges[name].read(drawn[self.anchor].float()), known[name]
                    scores = scorer(self.model.modalities[name])(self.model.modalities[name], *pair)
                    setting = {"observed": name in observed}
                    yield Row(f"{' + '.join(observed)} → {rest}", name, setting, {"n": count} | scores)

    def baselines(self) -> Iterator[Row]:
        """masked image → anchor where nothing is drawn: the mean fill, and the head in one evaluation."""
        for name in self.filled_by if state_probabilities(self.config, self.anchor).observed < 1 else ():
            yield from self._filled(name, 0, UNDRAWN, {}, num_inference_steps=0)

    def _filled(
        self, name: str, seed: int, by: tuple[str, ...], setting: dict[str, Any], **arguments: Any
    ) -> Iterator[Row]:
        """masked image → anchor for every set of masks; the picture is of the last set, a column for every way."""
        columns = self._columns.setdefault(name, {})
        image, masked = self.model.modalities[self.anchor], self.model.modalities[name]
        fills = self.holes.fills(name, lambda count, **more: self._draw(count, seed, **arguments | more), by)
        for about, value, known, filled in fills:
            yield Row(f"{name} → {self.anchor}", self.anchor, about | setting, self.holes.scores(filled, known))
            chosen = pictured(len(value))
            columns["truth"] = image.postprocess(self.holes.truth[chosen])
            columns["masked"] = [on_grey(picture) for picture in masked.postprocess(value[chosen])]
            columns[setting.get("conditioning", about["by"])] = image.postprocess(filled[chosen])
        if columns:
            self.pictures[name] = dict(columns)

    def _given(self, name: str, count: int) -> Tensor:
        """Values to condition on: the gallery's in turn where there is one, else those of held-out rows."""
        gallery = self.model.modalities[name].gallery()
        values = complete(self.held_out, name)[0] if gallery is None else gallery
        return values[torch.arange(count) % len(values)]

    def _scored(
        self, direction: str, setting: dict, drawn: dict[str, Tensor], conditions: dict[str, Tensor]
    ) -> Iterator[Row]:
        """The images by themselves, and each modality that a judge can read off them against the model's own value."""
        images = drawn[self.anchor].float()
        yield Row(direction, self.anchor, dict(setting), {"n": len(images)} | self._image_scores(images))
        for name, judge in self.judges.items():
            modality, judged = self.model.modalities[name], judge.read(images)
            outcome = scorer(modality)(modality, judged, conditions.get(name, drawn[name]))
            # no truth is at hand: the judge and the model agree or not
            scores = {"n": len(images)} | {key.replace("accuracy", "agreement"): x for key, x in outcome.items()}
            if f"{name}/last" in drawn and name not in conditions:
                last = scorer(modality)(modality, judged, drawn[f"{name}/last"])
                scores["of last draw"] = next(iter(last.values()))
            if name not in conditions:
                scores |= self._whole(name, drawn[name])
            if isinstance(modality, Label):
                scores["class shares"] = class_shares(judged.numpy(), modality.num_classes)
            yield Row(direction, name, dict(setting), scores)

    def _whole(self, name: str, values: Tensor) -> dict[str, Any]:
        """The share of values that are whole, where a rule of the data set judges that."""
        rule = WHOLE.get(str(self.config.data.source), {}).get(self.config.column(name))
        able = rule is not None and isinstance(self.model.modalities[name], Mask)  # a column may be read otherwise
        return scored("whole", rule(values).double()) if able else {}

    def _image_scores(self, images: Tensor) -> dict[str, Any]:
        return distances(self.extractor(images), self.features) | {
            "memorised": self.memorisation.share(images.numpy()),
            "memorised, expected": MEMORISED_EXPECTED,
            "std over samples": spread(images),
        }

    def _draw(self, count: int, seed: int, **arguments: Any) -> dict[str, Tensor]:
        sample = self.config.sample
        conditions = set(arguments.get("observed", {}))
        denoised = self.anchor not in conditions and arguments.get("num_inference_steps") != 0
        guidable = denoised and "concatenation" in arguments.get("conditioning", ("concatenation",))
        scales = sample.scales(conditions & set(self.model.observable)) if guidable else {}
        arguments = sample.phases() | {"guidance_scale": scales} | arguments
        return draw(self.pipeline, count, sample.batch_size, seed, **arguments)


def _asked(setting: dict[str, Any]) -> dict[str, Any]:
    """The pipeline's arguments of a row's setting."""
    return {k: sorted(methods_of_text(v)) if k == "conditioning" else v for k, v in setting.items()}


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """Without intervals and lists, to four digits."""
    return {name: round(value, 4) for name, value in scores.items() if isinstance(value, float)}
