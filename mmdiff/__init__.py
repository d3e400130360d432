"""mmdiff: multimodal, multitask diffusion in PyTorch.

The public names are imported on first use, so that `mmdiff --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdiff.config import load_config
    from mmdiff.errors import InputError
    from mmdiff.model import MTDiffusionModel
    from mmdiff.objective import MTObjective
    from mmdiff.pipeline import MTDiffusionPipeline
    from mmdiff.schedulers import MTDiffusionScheduler, MTFlowMatchScheduler
    from mmdiff.training import train

__version__ = "0.1.0"

_HOMES = {
    "InputError": "mmdiff.errors",
    "MTDiffusionModel": "mmdiff.model",
    "MTDiffusionPipeline": "mmdiff.pipeline",
    "MTDiffusionScheduler": "mmdiff.schedulers",
    "MTFlowMatchScheduler": "mmdiff.schedulers",
    "MTObjective": "mmdiff.objective",
    "load_config": "mmdiff.config",
    "train": "mmdiff.training",
}
__all__ = [
    "InputError",
    "MTDiffusionModel",
    "MTDiffusionPipeline",
    "MTDiffusionScheduler",
    "MTFlowMatchScheduler",
    "MTObjective",
    "load_config",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmdiff' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
