"""A scheduler of diffusers in the place of ours: taken as the solver that it is."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from mmdiff.errors import InputError
from mmdiff.schedulers.base import MTScheduler

_TAKEN = ("timestep_spacing", "clip_sample", "clip_sample_range")  # of sampling; what else we share is the model's path


def as_ours(scheduler: Any, current: MTScheduler | None) -> MTScheduler:
    """`DDIMScheduler.from_config(pipe.scheduler.config)` as our scheduler with that solver.

    Args:
        scheduler: ours, which is returned as it is, or one of diffusers.
        current: the one in use, of which the path is kept; None where there is none yet.

    Raises:
        InputError: for a solver or an option that does not fit, by name; for another path than the model's; and where
            nothing is known of the path.
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
    taken = {key: value for key, value in changed.items() if key in _TAKEN}
    options = {key: value for key, value in changed.items() if key not in _TAKEN}
    return type(current).from_config(current.config, solver=name, solver_config=options or None, **taken)


def _changed(scheduler: Any, current: MTScheduler) -> dict[str, Any]:
    """{argument: value} where it differs from ours, or from the class's default where we have none."""
    name, changed = type(scheduler).__name__, {}
    own, given = current.solvers[name], scheduler.config
    fixed = [arguments.items() for arguments in own.arguments.values()]
    for key, parameter in inspect.signature(type(scheduler).__init__).parameters.items():
        usual = current.config.get(key, parameter.default)
        if key not in given or given[key] == usual or any((key, given[key]) in items for items in fixed):
            continue
        if key in current.config and key not in _TAKEN:
            remedy = f"differs from the model's, {usual!r}; take {name}.from_config(pipe.scheduler.config)"
            raise InputError(f"scheduler.{key}", given[key], remedy)
        changed[key] = given[key]
    return changed
