"""The fusion benchmark by a vision-language model: questions about sets of photos, answered in words."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from mmdiff.benchmarks.cache import stored
from mmdiff.benchmarks.fusion.entries import BEST, FINE_TUNED, FUSED, PROMPT_FINE_TUNED, PROMPTED, SINGLE, ZERO_SHOT
from mmdiff.benchmarks.fusion.learning import Answers, CellAnswers, Learner, fit
from mmdiff.benchmarks.fusion.photos import ImageSets, Photos, one_large
from mmdiff.benchmarks.fusion.settings import Schedule
from mmdiff.errors import at
from mmdiff.vlm import Inputs, Reader, VisionLanguageModel, architecture_of
from mmdiff.vlm.small import Sizes, make_small, small_architecture

_CHUNK = 100  # prompts that are answered at once


class Given(NamedTuple):
    """The answer to a prompt, the tokens of the prompt, and the seconds of generating (those of a batch, shared)."""

    text: str
    tokens: int
    seconds: float


class Pixels:
    """The photos of B sets, preprocessed once; no memory goes into padding.

    Args:
        reader: of the model.
        photos: of the sets.
    """

    def __init__(self, reader: Reader, photos: list[Photos]) -> None:
        flat = [photo for members in photos for photo in members]
        self.flat = torch.cat([reader.pixels(flat[k : k + _CHUNK]) for k in range(0, len(flat), _CHUNK)])
        self.counts = torch.tensor([len(members) for members in photos])
        self.starts = self.counts.cumsum(dim=0) - self.counts

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, n, 3, H, W) and mask (b, n) of some sets."""
        places = torch.arange(int(self.counts[rows].max()))
        mask = places < self.counts[rows, None]
        images = self.flat.new_zeros(*mask.shape, *self.flat.shape[1:])
        images[mask] = self.flat[(self.starts[rows, None] + places)[mask]]
        return images, mask


class LanguageModels(Learner):
    """A small model is pretrained on single photos and all tasks, once per seed; or a published one is taken as it is.

    A fusion learns alone, with all else frozen, unless the experiment says `learns: all`. Mean and max have nothing to
    learn. For concatenated photos, and all photos in the prompt, all learns that stands between encoder and language
    model, which is more than a fusion's weights.
    """

    devices = ("cpu", "cuda")

    def several(self, opened: bool) -> bool:
        if self.settings.model:
            with at("fusion"):
                return not opened or architecture_of(self.settings.model).several
        with at("fusion.small"):
            return small_architecture(self.settings.small.kind).several

    def learned(self, entry: str, seed: int) -> Iterable[CellAnswers]:
        kind, dropped = FUSED.get(entry, ("mean", False))
        model, reader = self._pretrained(kind, seed)
        if entry in FUSED:
            self._learn(model, reader, self.settings.learns, self.sets(None, dropped), self.settings.training, seed)
        elif entry == FINE_TUNED:
            self._learn(model, reader, "connector", self._large, self.settings.training, seed)
        elif entry == PROMPT_FINE_TUNED:
            self._learn(model, reader, "connector", self.image_sets, self.settings.training, seed, fused=False)
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
        return model.to(self.device), self._reader(model)

    def _reader(self, model: VisionLanguageModel) -> Reader:
        return Reader(model, size=None if model.parts.fixed else self.settings.data.size)

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
        self._learn(model, self._reader(model), "all", self.single, settings.pretraining, seed)
        model.model.save_pretrained(partial)

    def _learn(
        self,
        model: VisionLanguageModel,
        reader: Reader,
        part: str,
        image_sets: ImageSets,
        schedule: Schedule,
        seed: int,
        fused: bool = True,
    ) -> None:
        """Row k is asked the k-th of all tasks, in turn."""
        learned, rows = model.learn(part), range(len(image_sets.photos))
        if not learned or not schedule.steps:
            return
        names = list(self.settings.tasks)
        tasks = [names[row % len(names)] for row in rows]
        answers = [image_sets.answers[task][row] for row, task in enumerate(tasks)]
        questions = [image_sets.questions[task][row] for row, task in enumerate(tasks)]
        pixels = Pixels(reader, image_sets.photos)
        shown = [members[:1] for members in image_sets.photos] if fused else image_sets.photos
        texts = reader(shown, questions, answers, fused)[2:]

        def loss(picks: Tensor) -> Tensor:
            inputs = (*pixels.of(picks), *(tensor[picks] for tensor in texts))
            error = model(*(tensor.to(model.model.device) for tensor in inputs), fused=fused).loss
            assert error is not None  # answers were given
            return error

        fit(learned, loss, len(rows), schedule, seed)

    # ------------------------------------------------------------------------------------------------------ answering

    def _asked(
        self, model: VisionLanguageModel, reader: Reader, entry: str, questions: list[str], photos: list[Photos]
    ) -> Answers:
        prompts = [_prompts(entry, members) for members in photos]
        flat = [shown for each in prompts for shown in each]
        asked = [question for question, each in zip(questions, prompts, strict=True) for _ in each]
        given, weights = self._generated(model, reader, flat, asked, fused=entry not in PROMPTED)
        rest = iter(given)
        sets = [[next(rest) for _ in each] for each in prompts]
        cost = {
            "prompt tokens": median(sum(one.tokens for one in each) for each in sets),
            "seconds per answer": median(sum(one.seconds for one in each) for each in sets),
        }
        with_distractors = entry in FUSED and not FUSED[entry][1]
        return Answers([[one.text for one in each] for each in sets], weights if with_distractors else None, cost)

    def _generated(
        self, model: VisionLanguageModel, reader: Reader, photos: list[Photos], questions: list[str], fused: bool
    ) -> tuple[list[Given], Tensor | None]:
        """(answers to B prompts, weights (B, n) or None)."""
        given, weights = [], []
        most = max(map(len, photos))
        for start in range(0, len(photos), _CHUNK):
            part = photos[start : start + _CHUNK]
            inputs: Inputs = reader(part, questions[start : start + _CHUNK], fused=fused)
            started = time.perf_counter()
            given_to = [tensor.to(self.device) for tensor in inputs[:4]]
            found = model.generate(*given_to, fused=fused, max_new_tokens=self.settings.new_tokens, do_sample=False)
            seconds = (time.perf_counter() - started) / len(part)
            texts, tokens = reader.texts(found.tokens), inputs.attention_mask.sum(dim=1).tolist()
            given += [Given(" ".join(text.split()), count, seconds) for text, count in zip(texts, tokens)]
            if found.weights is not None:
                weights.append(torch.nn.functional.pad(found.weights.cpu(), (0, most - found.weights.shape[1])))
        return given, torch.cat(weights) if weights else None


def _prompts(entry: str, photos: Photos) -> list[Photos]:
    """The photos of each prompt that an answer about a set needs."""
    if entry in (ZERO_SHOT, FINE_TUNED):
        return [[one_large(photos)]]
    if entry == SINGLE:
        return [photos[:1]]
    return [[photo] for photo in photos] if entry == BEST else [photos]
