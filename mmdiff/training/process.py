"""The processes of a run: threads, the accelerator that must see every process, and a clean stop."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather_object,
)
from safetensors import SafetensorError

from mmdiff.config import TrainConfig
from mmdiff.errors import InputError, TrainingError


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


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of one device.

    `torch.manual_seed` seeds all devices; where CUDA is not in use it keeps a stack trace of every call, 0.4 ms each.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


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
        InputError: when a launcher started several processes of which this one knows nothing.
    """
    if "WORLD_SIZE" not in os.environ:  # a notebook may train twice, with another precision
        AcceleratorState._reset_state(reset_partial_state=True)
    options = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    parts = GradientAccumulationPlugin(num_steps=1)  # the trainer averages the parts itself
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, kwargs_handlers=[options], gradient_accumulation_plugin=parts
    )
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != accelerator.num_processes:
        raise InputError(
            "WORLD_SIZE",
            world,
            f"but Accelerate sees {accelerator.num_processes} process; on CPUs start "
            "`ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N -m mmdiff train …`",
        )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise InputError("accelerate", str(accelerator.distributed_type), "choose DDP, FSDP2 or DeepSpeed's ZeRO-2")
    return accelerator


def on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Do something on the main process; what it raises is raised on every process, so that none waits for it."""
    fault = [_fault(action) if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(fault)
    if fault[0] is not None:
        raise fault[0]


def everywhere(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Do something on every process; what one of them raises is raised on all."""
    faults: list[Exception | None] = [_fault(action)]
    if accelerator.num_processes > 1:
        faults = gather_object(faults)
    for fault in filter(None, faults):
        raise fault


def _fault(action: Callable[[], object]) -> Exception | None:
    """What an action raises, of what a person can mend."""
    try:
        action()
    except (InputError, TrainingError, OSError, SafetensorError) as error:
        return error
    return None
