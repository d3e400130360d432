"""Trainings of a benchmark, which end after some CPU time."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch import Tensor

from mmdiff.config import Config
from mmdiff.errors import InputError
from mmdiff.training.trainer import Trainer

_ENDLESS = 10**9  # steps; time ends the training


def endless(config: Config) -> Config:
    """The experiment without a last step.

    Raises:
        InputError: its learning rate depends on the number of steps.
    """
    if not config.train.lr_scheduler_type.startswith("constant"):
        remedy = "depends on the number of steps, which --seconds leaves open; choose constant_with_warmup"
        raise InputError("train.lr_scheduler_type", config.train.lr_scheduler_type, remedy)
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": _ENDLESS})})


def steps(trainer: Trainer, seconds: float) -> Iterator[dict[str, Tensor]]:
    """The loss terms of each step that is taken; the last one is that in which the CPU time runs out.

    Args:
        trainer: at step 0.
        seconds: of CPU time; 0: the trainer's own number of steps.
    """
    started = time.process_time()
    for step, micro_batches in trainer.loader(0):
        yield trainer.step(step, micro_batches)
        if seconds and time.process_time() - started >= seconds:
            break
