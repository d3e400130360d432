"""The learning rate as a pure function of the step, by the names of transformers' schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

from mmdiff.config import TrainConfig

# progress from 0, after the warm-up, to 1, after the last step -> share of the way down that is still to go
_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "constant_with_warmup": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then by `train.lr_scheduler_type` down to `train.min_learning_rate`."""
    warmup = 0 if config.lr_scheduler_type == "constant" else config.warmup
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    low = config.min_learning_rate
    return low + (config.learning_rate - low) * _SHAPES[config.lr_scheduler_type](progress)


def knows_its_end(config: TrainConfig) -> bool:
    """Whether the schedule depends on the number of steps."""
    return not config.lr_scheduler_type.startswith("constant")
