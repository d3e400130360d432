"""What the tasks of the fusion benchmark share: entries, cells of held-out image sets, the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmdiff.benchmarks.fusion.image_sets import ImageSets, held_out_sets, single_photos, training_sets
from mmdiff.benchmarks.fusion.settings import Schedule, Settings
from mmdiff.modalities.fusion import FUSIONS

ZERO_SHOT, FINE_TUNED = "concatenated, zero-shot", "concatenated, fine-tuned"
SINGLE, BEST = "single image", "best single image"
ENTRIES = (*FUSIONS, ZERO_SHOT, FINE_TUNED, SINGLE, BEST)
Cell = tuple[int, float]  # photos per set, share of distractors


class Answers(NamedTuple):
    """``texts`` of B sets, each a list (of one, but for `BEST`); ``weights`` (B, n) of their photos, or None."""

    texts: list[list[str]]
    weights: Tensor | None = None


class Learner(ABC):
    """Learns from image sets and answers what is asked about others.

    Args:
        settings: of the experiment.
        folder: what was pretrained is kept there.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        test = settings.test
        self.cells: list[Cell] = [(views, share) for share in test.distractors for views in test.views]
        self._tests: dict[Cell, ImageSets] = {}

    @cached_property
    def image_sets(self) -> ImageSets:
        """For training."""
        return training_sets(self.settings)

    @cached_property
    def single(self) -> ImageSets:
        """For pretraining."""
        return single_photos(self.settings)

    def test(self, cell: Cell) -> ImageSets:
        """Held-out image_sets."""
        if cell not in self._tests:
            self._tests[cell] = held_out_sets(self.settings, *cell)
        return self._tests[cell]

    @abstractmethod
    def answers(self, entry: str, seed: int) -> Iterable[tuple[Cell, dict[str, Answers]]]:
        """Learn as the entry does, then answer all tasks in each of the cells."""


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
