"""What a measurement depends on beside the code: the command, the machine, its load, the date and the versions."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch

import mmdiff
from mmdiff.evaluation.report import command


def machine(device: str = "cpu") -> dict[str, Any]:
    """Plain facts, as they are now."""
    return {
        "date": date.today().isoformat(),
        "command": command(),
        "machine": f"{platform.machine()}, {_processor()}, {len(os.sched_getaffinity(0))} cores"
        if hasattr(os, "sched_getaffinity")
        else f"{platform.machine()}, {_processor()}",
        "accelerator": torch.cuda.get_device_name() if device == "cuda" else "none",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {
            "mmdiff": mmdiff.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
    }


def _processor() -> str:
    """The CPU's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"
