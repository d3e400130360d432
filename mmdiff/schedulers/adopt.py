"""A scheduler of diffusers as the solver of one of ours."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from mmdiff.errors import InputError
from mmdiff.schedulers.base import MTScheduler

_SAMPLING = ("timestep_spacing", "clip_sample", "clip_sample_range")  # other shared arguments fix the model's path


def as_ours(scheduler: Any, current: MTScheduler | None) -> MTScheduler:
    """`DDIMScheduler.from_config(pipe.scheduler.config)` as our scheduler with that solver.

    Args:
        scheduler: ours, which is returned unchanged, or one of diffusers.
        current: the scheduler in use, whose path is kept; None: there is none yet.

    Raises:
        InputError: for a solver or an option that does not fit, for another path than the model's, and for a diffusers
            scheduler without ``current``.
    """
    if isinstance(scheduler, MTScheduler):
        return scheduler
    if not isinstance(scheduler, SchedulerMixin):
        raise InputError("scheduler", scheduler, "is no scheduler")
    name = type(scheduler).__name__
    if current is None:
        raise InputError("scheduler", name, "needs an MTDiffusionScheduler or MTFlowMatchScheduler with solver=…")
    if name not in current.solvers:
        return type(current).from_config(current.config, solver=name)  # which refuses it, with the reason
    if type(scheduler) is not current.solvers[name].scheduler:
        raise InputError("scheduler", f"{type(scheduler).__module__}.{name}", "is not the class of diffusers")
    changed = _changed(scheduler, current)
    sampling = {key: value for key, value in changed.items() if key in _SAMPLING}
    options = {key: value for key, value in changed.items() if key not in _SAMPLING}
    return type(current).from_config(current.config, solver=name, solver_config=options or None, **sampling)


def _changed(scheduler: Any, current: MTScheduler) -> dict[str, Any]:
    """{argument: value} of those that differ from ours, or from the class's default if we have no such argument."""
    name, changed = type(scheduler).__name__, {}
    config = scheduler.config
    fixed = [arguments.items() for arguments in current.solvers[name].arguments.values()]
    for key, parameter in inspect.signature(type(scheduler).__init__).parameters.items():
        usual = current.config.get(key, parameter.default)
        if key not in config or config[key] == usual or any((key, config[key]) in items for items in fixed):
            continue
        if key in current.config and key not in _SAMPLING:
            remedy = f"differs from the model's, {usual!r}; take {name}.from_config(pipe.scheduler.config)"
            raise InputError(f"scheduler.{key}", config[key], remedy)
        changed[key] = config[key]
    return changed
