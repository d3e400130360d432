"""What the benchmark asks of every model that it compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from mmdiff.benchmarks.coherence.scores import Images
from mmdiff.config import Config
from mmdiff.data import Table


class Budget(NamedTuple):
    """Of a training: CPU ``seconds``, ``factor`` of the side's own learning rate, ``seed`` of weights and batches."""

    seconds: float
    factor: float
    seed: int


@dataclass(frozen=True)
class Task:
    """What all sides train on: an experiment (resolved, without a last step), and its rows, some values missing."""

    config: Config
    table: Table

    @property
    def names(self) -> list[str]:
        """Of the modalities, the anchor first."""
        return [self.config.anchor, *self.config.auxiliary()]


class Trained(Protocol):
    """A trained model; what it draws is a function of the seed."""

    facts: dict[str, Any]  # for the table: steps, CPU seconds, parameters, learning rate

    def joint(self, count: int, seed: int) -> Images:
        """All images of ``count`` rows, nothing given."""
        ...

    def rest(self, given: Images, seed: int) -> Images:
        """The images that are not given."""
        ...


class Side(Protocol):
    """Trains within a budget."""

    def __call__(self, task: Task, budget: Budget) -> Trained: ...
