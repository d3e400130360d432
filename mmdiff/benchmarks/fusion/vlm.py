"""The fusion benchmark by a vision-language model: questions about sets of photos, answered in words."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mmdiff.benchmarks.cache import stored
from mmdiff.benchmarks.fusion.entries import FINE_TUNED, FUSED, SINGLE, ZERO_SHOT
from mmdiff.benchmarks.fusion.learning import Answers, CellAnswers, Learner, fit
from mmdiff.benchmarks.fusion.photos import ImageSets, Photos, one_large
from mmdiff.benchmarks.fusion.settings import Schedule
from mmdiff.vlm import Inputs, Reader, VisionLanguageModel
from mmdiff.vlm.small import Sizes, make_small

_CHUNK = 100  # sets that are answered at once


class LanguageModels(Learner):
    """A small model is pretrained on single photos and all tasks, once per seed; or a published one is taken as it is.

    A fusion learns alone, with all else frozen, unless the experiment says `learns: all`. Mean and max have nothing to
    learn. The concatenated photos are fine-tuned by all that stands between encoder and language model, which is more
    than a fusion's weights.
    """

    def learned(self, entry: str, seed: int) -> Iterable[CellAnswers]:
        kind, dropped = FUSED.get(entry, ("mean", False))
        model, reader = self._pretrained(kind, seed)
        if entry in FUSED:
            self._learn(model, reader, self.settings.learns, self.sets(None, dropped), self.settings.training, seed)
        elif entry == FINE_TUNED:
            self._learn(model, reader, "connector", self._large, self.settings.training, seed)
        model.eval()
        for cell in self.cells:
            sets = self.sets(cell, dropped)
            asked = {task: sets.questions[task] for task in self.settings.tasks}
            yield cell, {task: self._asked(model, reader, entry, own, sets.photos) for task, own in asked.items()}

    @cached_property
    def _large(self) -> ImageSets:
        """The training image sets, of one large image each."""
        return self.image_sets._replace(photos=[[one_large(photos)] for photos in self.image_sets.photos])

    # ------------------------------------------------------------------------------------------------------- learning

    def _pretrained(self, fusion: str, seed: int) -> tuple[VisionLanguageModel, Reader]:
        folder = self.settings.model or self._small(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = VisionLanguageModel.from_pretrained(folder, fusion, self.settings.hidden)
        return model, Reader(model)

    def _small(self, seed: int) -> Path:
        return stored(self.folder / f"model-{seed}", lambda partial: self._make_small(partial, seed))

    def _make_small(self, partial: Path, seed: int) -> None:
        shutil.rmtree(partial, ignore_errors=True)  # of an earlier call that was interrupted
        settings, small = self.settings, self.settings.small
        texts = [text for answers in self.single.answers.values() for text in answers]
        questions = [text for asked in self.single.questions.values() for text in asked]
        sizes = Sizes(settings.data.size, small.patch, small.width, small.layers, small.heads, small.queries)
        make_small(partial, small.kind, [*texts, *questions], sizes, seed)
        model = VisionLanguageModel.from_pretrained(partial, "mean")
        self._learn(model, Reader(model), "all", self.single, settings.pretraining, seed)
        model.model.save_pretrained(partial)

    def _learn(
        self,
        model: VisionLanguageModel,
        reader: Reader,
        part: str,
        image_sets: ImageSets,
        schedule: Schedule,
        seed: int,
    ) -> None:
        """Row k is asked the k-th of all tasks, in turn."""
        learned, rows = model.learn(part), range(len(image_sets.photos))
        if not learned or not schedule.steps:
            return
        names = list(self.settings.tasks)
        tasks = [names[row % len(names)] for row in rows]
        answers = [image_sets.answers[task][row] for row, task in enumerate(tasks)]
        questions = [image_sets.questions[task][row] for row, task in enumerate(tasks)]
        inputs = reader(image_sets.photos, questions, answers)

        def loss(picks: Tensor) -> Tensor:
            error = model(*(tensor[picks] for tensor in inputs)).loss
            assert error is not None  # answers were given
            return error

        fit(learned, loss, len(rows), schedule, seed)

    # ------------------------------------------------------------------------------------------------------ answering

    def _asked(
        self, model: VisionLanguageModel, reader: Reader, entry: str, questions: list[str], photos: list[Photos]
    ) -> Answers:
        if entry in FUSED:
            texts, weights = self._generated(model, reader, photos, questions)
            return Answers([[text] for text in texts], None if FUSED[entry][1] else weights)
        if entry in (ZERO_SHOT, FINE_TUNED):
            photos = [[one_large(members)] for members in photos]
        elif entry == SINGLE:
            photos = [members[:1] for members in photos]
        flat = [[photo] for members in photos for photo in members]
        each = [question for question, members in zip(questions, photos, strict=True) for _ in members]
        texts, _ = self._generated(model, reader, flat, each)
        rest = iter(texts)
        return Answers([[next(rest) for _ in members] for members in photos])

    def _generated(
        self, model: VisionLanguageModel, reader: Reader, photos: list[Photos], questions: list[str]
    ) -> tuple[list[str], Tensor]:
        """(texts of B sets, weights (B, n))."""
        texts, weights = [], []
        most = max(map(len, photos))
        for start in range(0, len(photos), _CHUNK):
            part = photos[start : start + _CHUNK]
            inputs: Inputs = reader(part, questions[start : start + _CHUNK])
            generated = model.generate(*inputs[:4], max_new_tokens=self.settings.new_tokens, do_sample=False)
            texts += [" ".join(text.split()) for text in reader.texts(generated.tokens)]
            weights.append(torch.nn.functional.pad(generated.weights, (0, most - generated.weights.shape[1])))
        return texts, torch.cat(weights)
