"""A scheduler of diffusers in the place of ours: taken as the solver that it is."""

from __future__ import annotations

import inspect
from typing import Any

from mmdiff.errors import InputError
from mmdiff.schedulers.base import MTScheduler


def as_ours(scheduler: Any, current: MTScheduler | None) -> MTScheduler:
    """`DDIMScheduler.from_config(pipe.scheduler.config)` as our scheduler with that solver.

    Args:
        scheduler: ours, which is returned as it is, or one of diffusers.
        current: the one in use, of which everything but the solver is kept; None where there is none yet.

    Raises:
        InputError: for a solver that does not fit the path, by name, and where nothing is known of the path.
    """
    if isinstance(scheduler, MTScheduler):
        return scheduler
    name = type(scheduler).__name__
    if current is None:
        raise InputError("scheduler", name, "needs an MTDiffusionScheduler or MTFlowMatchScheduler with solver=…")
    options = current.solvers[name].options if name in current.solvers else {}
    changed = {key: scheduler.config[key] for key in options if _is_changed(scheduler, key)}
    return type(current).from_config(current.config, solver=name, solver_config=changed or None)


def _is_changed(scheduler: Any, key: str) -> bool:
    parameter = inspect.signature(type(scheduler).__init__).parameters.get(key)
    return parameter is not None and scheduler.config[key] != parameter.default
