"""What a run makes of its machine: images per second, model FLOPs utilisation and memory."""

from __future__ import annotations

import functools
import time
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from mmdiff.model import MTDiffusionModel
from mmdiff.training.flops import matrix_peak, training_flops

#: FLOPs per second of dense matrix products on tensor cores by the makers' data sheets:
#: {part of the device's name: (16 bits, TF32, float32)}; the first part that the name holds counts.
PEAKS: dict[str, tuple[float, float, float]] = {
    "A100": (312e12, 156e12, 19.5e12),
    "H100 PCIe": (756e12, 378e12, 51e12),
    "H100 NVL": (835e12, 417e12, 60e12),
    "H100": (989e12, 494e12, 67e12),
    "H200": (989e12, 494e12, 67e12),
    "B200": (2250e12, 1125e12, 75e12),
}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def peak_of(device: torch.device, precision: str) -> tuple[float, str]:
    """(FLOPs per second that the device can reach, where the number is from).

    Args:
        device: of the run.
        precision: `train.mixed_precision`; float32 products may use TF32, if torch was told so.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = next((peaks for part, peaks in PEAKS.items() if part in name), None)
    if known is not None:
        narrow = torch.get_float32_matmul_precision() != "highest"
        return known[0 if precision in _DTYPES else 1 if narrow else 2], f"data sheet of {name}"
    dtype = _DTYPES.get(precision, torch.float32)
    return _measured(device, dtype, torch.get_num_threads()), f"matrix products on {name or device.type} in {dtype}"


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return matrix_peak(device, dtype, rounds=2)


def image_flops(model: MTDiffusionModel) -> int:
    """FLOPs of training the backbone and the heads on one image of the config's size; frozen encoders do not count."""
    device, modes = model.device, {module: module.training for module in model.modules()}
    z = torch.zeros(1, *model.space, device=device)
    observation = model.observation({}, {}, {}, like=z)
    if count := model.backbone.random_numbers(*model.space[1:]):  # what the backbone leaves out in training
        observation = observation._replace(random=torch.linspace(0, 1, count, device=device)[None])
    model.eval()  # no buffer moves
    try:
        return training_flops(lambda: model(z, torch.zeros(1, dtype=torch.int64, device=device), observation))
    finally:
        for module, training in modes.items():
            module.training = training


class Meter:
    """Measures from one line of metrics to the next.

    Args:
        model: before its state is laid out over processes.
        accelerator: of the run.
        precision: `train.mixed_precision`.
    """

    def __init__(self, model: MTDiffusionModel, accelerator: Accelerator, precision: str) -> None:
        self.device, self.processes = accelerator.device, accelerator.num_processes
        self.flops = image_flops(model)
        self.peak, self.source = peak_of(self.device, precision)
        self.restart()

    def restart(self) -> None:
        """Begin anew."""
        self.started, self.images = time.perf_counter(), 0

    def measure(self) -> dict[str, Any]:
        """images_per_second of all processes, mfu as a share of their peaks, memory_gib of this process."""
        rate = self.images / (time.perf_counter() - self.started)
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = psutil.Process().memory_info().rss
        utilisation = rate * self.flops / (self.peak * self.processes)
        return {"images_per_second": rate, "mfu": utilisation, "memory_gib": memory / 2**30}

    def __str__(self) -> str:
        return (
            f"{self.flops:.3g} FLOPs per image; MFU is the share of {self.peak:.3g} FLOPs per second, by {self.source}"
        )
