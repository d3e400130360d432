"""What the tasks of the fusion benchmark share: entries, cells of held-out image sets, the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmdiff.benchmarks.fusion.entries import BEST, ENTRIES, ORACLE_VOTE, PLURALITY, PROMPTED
from mmdiff.benchmarks.fusion.image_sets import held_out_sets, single_photos, training_sets
from mmdiff.benchmarks.fusion.photos import ImageSets, own_photos
from mmdiff.benchmarks.fusion.scores import plurality
from mmdiff.benchmarks.fusion.settings import Schedule, Settings
from mmdiff.errors import InputError

Cell = tuple[int, float]  # photos per set, share of distractors


class Answers(NamedTuple):
    """``texts`` of B sets, each a list (of one, but for `BEST`); ``weights`` (B, n) of their photos, or None; ``cost``
    of an answer about a set by name, where it is measured."""

    texts: list[list[str]]
    weights: Tensor | None = None
    cost: dict[str, float] = {}


CellAnswers = tuple[Cell, dict[str, Answers]]  # a cell's answers to every task


class Learner(ABC):
    """Learns from image sets and answers what is asked about others.

    Args:
        settings: of the experiment.
        folder: what was pretrained is kept there.
        device: of `devices`; parts of several devices differ by rounding, and are stored as the same.

    Raises:
        InputError: for another device, or one that is not here.
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu",)

    def __init__(self, settings: Settings, folder: Path, device: str = "cpu") -> None:
        if device not in self.devices or (device == "cuda" and not torch.cuda.is_available()):
            remedy = f"is not for learner: {settings.learner}, or not here; it takes {', '.join(self.devices)}"
            raise InputError("--device", device, remedy)
        self.settings, self.folder, self.device = settings, folder, torch.device(device)
        test = settings.test
        self.cells: list[Cell] = [(views, share) for share in test.distractors for views in test.views]
        self._tests: dict[Cell, ImageSets] = {}
        self._each: tuple[int, list[CellAnswers]] = (-1, [])  # of one seed

    @cached_property
    def image_sets(self) -> ImageSets:
        """For training."""
        return training_sets(self.settings)

    @cached_property
    def single(self) -> ImageSets:
        """For pretraining."""
        return single_photos(self.settings)

    def test(self, cell: Cell) -> ImageSets:
        """Held-out image sets."""
        if cell not in self._tests:
            self._tests[cell] = held_out_sets(self.settings, *cell)
        return self._tests[cell]

    def sets(self, cell: Cell | None, dropped: bool) -> ImageSets:
        """For training (None) or of a cell; ``dropped``: without their distractors."""
        sets = self.image_sets if cell is None else self.test(cell)
        return own_photos(sets) if dropped else sets

    def several(self, opened: bool) -> bool:
        """Whether it takes all photos of a set in one prompt.

        Args:
            opened: whether a published model's config may be opened to see; else it counts as one that does.
        """
        return False

    def entries(self, opened: bool = True) -> list[str]:
        """What is compared.

        Raises:
            InputError: the settings name an entry that this learner does not have.
        """
        several, wanted = self.several(opened), self.settings.entries
        missing = [entry for entry in wanted or [] if entry in PROMPTED and not several]
        if missing:
            raise InputError("fusion.entries", missing[0], "needs a language model that takes several images")
        return wanted or [entry for entry in ENTRIES if several or entry not in PROMPTED]

    def answers(self, entry: str, seed: int) -> Iterable[CellAnswers]:
        """Learn as the entry does, then answer all tasks in each of the cells."""
        votes = {BEST: self._each_photo, PLURALITY: self._plurality, ORACLE_VOTE: self._oracle_vote}
        return votes[entry](seed) if entry in votes else self.learned(entry, seed)

    @abstractmethod
    def learned(self, entry: str, seed: int) -> Iterable[CellAnswers]:
        """The same; of `BEST` the answer for every photo, and no votes."""

    def _each_photo(self, seed: int) -> list[CellAnswers]:
        if self._each[0] != seed:
            self._each = (seed, list(self.learned(BEST, seed)))
        return self._each[1]

    def _plurality(self, seed: int) -> Iterable[CellAnswers]:
        for cell, tasks in self._each_photo(seed):
            yield cell, {task: _voted(a.texts, seed)._replace(cost=a.cost) for task, a in tasks.items()}

    def _oracle_vote(self, seed: int) -> Iterable[CellAnswers]:
        for cell in self.cells:
            yield cell, {task: _voted(texts, seed) for task, texts in self.test(cell).shown.items()}


def _voted(texts: list[list[str]], seed: int) -> Answers:
    return Answers([[text] for text in plurality(texts, seed)])


def fit(
    parameters: Iterable[nn.Parameter], loss: Callable[[Tensor], Tensor], rows: int, schedule: Schedule, seed: int
) -> None:
    """AdamW on random rows, with one cycle of the learning rate.

    Args:
        parameters: what learns.
        loss: row numbers (B,) -> mean loss.
        rows: how many there are.
        schedule, seed: of the training.
    """
    chosen = list(parameters)
    if not schedule.steps or not chosen:
        return
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(chosen, lr=schedule.learning_rate, weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.learning_rate, total_steps=schedule.steps + 1, pct_start=0.1
    )
    for _ in range(schedule.steps):
        picks = torch.randint(rows, (min(schedule.batch_size, rows),), generator=generator)
        optimizer.zero_grad()
        loss(picks).backward()
        optimizer.step()
        cycle.step()
