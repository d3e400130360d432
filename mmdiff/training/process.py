"""The processes of a run: threads, the accelerator that must see every process, and a clean stop."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from mmdiff.config import TrainConfig
from mmdiff.errors import InputError


def set_threads(threads: int) -> None:
    """CPU threads: as asked, else OMP_NUM_THREADS, else as many as the CPU affinity allows each local process.

    The 1 that `accelerate launch` and torchrun put into OMP_NUM_THREADS is nobody's choice and does not count.
    """
    chosen = int(os.environ.get("OMP_NUM_THREADS", 0))
    if chosen == 1 and {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & set(os.environ):
        chosen = 0
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(threads or chosen or max(1, share))


class StopSignal:
    """Within its context SIGTERM and SIGINT ask for a checkpoint and a clean exit."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread, as in some notebooks
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    def agreed(self, accelerator: Accelerator, due: bool) -> bool:
        """Whether all processes stop here; several processes ask one another only when they talk anyway."""
        if accelerator.num_processes == 1:
            return self.requested
        if not due:
            return False
        flag = torch.tensor([float(self.requested)], device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum").item() > 0)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator, once it is certain that it sees every process.

    Raises:
        InputError: when a launcher started several processes of which this one knows nothing, or under FSDP.
    """
    if "WORLD_SIZE" not in os.environ:  # a notebook may train twice, with another precision
        AcceleratorState._reset_state(reset_partial_state=True)
    options = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=[options])
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != accelerator.num_processes:
        raise InputError(
            "WORLD_SIZE",
            world,
            f"but Accelerate sees {accelerator.num_processes} process; on CPUs start "
            "`ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N -m mmdiff train …`",
        )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise InputError("accelerate", str(accelerator.distributed_type), "choose data parallelism (DDP)")
    return accelerator
