"""`train.sharding`: how the state of a run lies on its processes."""

from __future__ import annotations

from accelerate import Accelerator

from mmdiff.config import TrainConfig
from mmdiff.training.parallel import Replicated
from mmdiff.training.sharded import FullySharded
from mmdiff.training.zero2 import DeepSpeedZero2

SHARDINGS: dict[str, type[Replicated]] = {"none": Replicated, "fsdp2": FullySharded, "zero2": DeepSpeedZero2}


def find_parallel(accelerator: Accelerator, config: TrainConfig) -> Replicated:
    """As the config asks; a single process has everything anyway."""
    kind = config.sharding if accelerator.num_processes > 1 else "none"
    return SHARDINGS[kind](accelerator, config)
