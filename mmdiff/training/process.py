"""The processes of a run: threads, the accelerator that must see every process, and a clean stop."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    broadcast_object_list,
)
from pydantic import ValidationError

from mmdiff.config import Config, TrainConfig
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


_REFUSED = {  # {environment of `accelerate launch`: (flag, what means that nobody asked)}
    "ACCELERATE_DYNAMO_BACKEND": ("--dynamo_backend", "no"),
    "ACCELERATE_USE_DEEPSPEED": ("--use_deepspeed", "false"),
    "ACCELERATE_USE_FSDP": ("--use_fsdp", "false"),
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", "false"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("--use_parallelism_config", "false"),
    "ACCELERATE_GRADIENT_CLIPPING": ("--gradient_clipping", "none"),
}


def obey_launcher(config: Config) -> Config:
    """The config with what `accelerate launch` was asked for where the config leaves the key out.

    Raises:
        InputError: the two contradict each other, or the launcher was asked for what mmdiff does not do.
    """
    for name, (flag, unasked) in _REFUSED.items():
        if (value := os.environ.get(name, unasked)).lower() not in (unasked, ""):
            raise InputError(f"accelerate launch {flag}", value, "is not supported; leave it out")
    asked = _asked()
    for key in asked.keys() & config.train.model_fields_set:
        if (own := getattr(config.train, key)) != asked[key]:
            remedy = f"but `accelerate launch` was asked for {asked[key]!r}; leave one of them out"
            raise InputError(f"train.{key}", own, remedy)
    tree = config.train.model_dump() | asked
    try:
        return config.model_copy(update={"train": TrainConfig.model_validate(tree)}) if asked else config
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise InputError(f"accelerate launch: {key}", asked[key], error.errors()[0]["msg"]) from None


def _asked() -> dict[str, str | int]:
    """{key of `train`: what `accelerate launch` was asked for}; "no" and 1 stand there unasked."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if "ACCELERATE_MIXED_PRECISION" in os.environ and steps == "1":
        steps = _parent_flag("gradient_accumulation_steps") or steps  # not in the environment without DeepSpeed
    try:
        asked = {"mixed_precision": precision, "accumulate": int(steps)}
    except ValueError:
        raise InputError("accelerate launch --gradient_accumulation_steps", steps, "must be a whole number") from None
    return {key: value for key, value in asked.items() if value not in ("no", 1)}


def _parent_flag(name: str) -> str | None:
    """What the command line of the launcher, which is this process's parent, says."""
    try:
        arguments = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    return vars(parser.parse_known_args(arguments)[0])[name]


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator, once it is certain that it sees every process.

    Raises:
        InputError: when a launcher started several processes of which this one knows nothing, or under FSDP.
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
        raise InputError("accelerate", str(accelerator.distributed_type), "choose data parallelism (DDP)")
    return accelerator


def on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Do something on the main process; what it raises is raised on every process, so that none waits for it."""
    fault: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except (InputError, TrainingError, OSError) as error:
            fault[0] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(fault)
    if fault[0] is not None:
        raise fault[0]
