"""Settings of our schedulers that express one of diffusers: a pretrained network keeps its path and its target."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from diffusers import DDPMScheduler

from mmdiff.errors import InputError
from mmdiff.schedulers import SCHEDULERS
from mmdiff.schedulers.adopt import as_ours
from mmdiff.schedulers.arguments import ARGUMENTS, check_value
from mmdiff.schedulers.base import MTScheduler
from mmdiff.schedulers.mt_diffusion import BETA_SCHEDULES

BETAS = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
PATH = ("num_train_timesteps", "prediction_type", *BETAS)  # what the weights of a network depend on
_SAMPLING = ("timestep_spacing", "clip_sample", "clip_sample_range", "solver", "solver_config")
_CLIPS = ("clip_sample", True)
_CLIPPED = "where z_0 is clipped DDIM takes the noise from it, as with use_clipped_model_output of diffusers"
_ERRORS = (ValueError, TypeError, LookupError, RuntimeError, AttributeError, ArithmeticError, NotImplementedError)


def settings_of(config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(settings of `scheduler` in a config, what of it they cannot express).

    Args:
        config: `scheduler_config.json` of diffusers, or of ours, whose weight schedules are left out.
    """
    name = config.get("_class_name")
    for kind, ours in SCHEDULERS.items():
        if ours.__name__ == name:
            return {"kind": kind, **_known(ours, config, (*PATH, *_SAMPLING))}, ""
    reason = f"{name} is none of our solvers"
    for kind, ours in SCHEDULERS.items():
        if name in ours.solvers:
            try:
                solver = ours.solvers[name].scheduler
                settings = _expressed(ours, solver, config)
                clips = config.get("clip_sample", True) and "use_clipped_model_output" in _parameters(solver.step)
                return {"kind": kind, **settings}, _CLIPPED if clips else ""
            except InputError as error:
                reason = f"{name}: {error}"
    if "beta_start" not in config and "trained_betas" not in config:
        return {}, reason
    try:  # the path alone, of which a DDPM is an example
        return {"kind": "diffusion", **_path(SCHEDULERS["diffusion"], _built(DDPMScheduler, config))}, reason
    except InputError as error:
        return {}, f"{name}: {error}"


def _expressed(ours: type[MTScheduler], solver: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """Path and solver of a scheduler of diffusers.

    Raises:
        InputError: for an option that ours do not have.
    """
    theirs = _built(solver, config)
    path = _path(ours, theirs)
    if "trained_betas" in path:
        theirs = _built(solver, {**config, **path})
    return path | _known(ours, as_ours(theirs, ours(**path)).config, _SAMPLING)


def _path(ours: type[MTScheduler], theirs: Any) -> dict[str, Any]:
    path = _known(ours, theirs.config, PATH)
    if path.get("beta_schedule", "linear") not in BETA_SCHEDULES:  # diffusers' sigmoid, for example
        path |= {"beta_schedule": "linear", "trained_betas": theirs.betas.tolist()}
    ours(**path)
    return path


def _known(ours: type[MTScheduler], config: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The entries that our class takes. Whether z_0 is clipped is left to the anchor unless the source does not."""
    parameters = _parameters(ours.__init__)
    known = {n: config[n] for n in names if n in config and n in parameters and config[n] is not None}
    return {n: list(value) if isinstance(value, tuple) else value for n, value in known.items() if (n, value) != _CLIPS}


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _built(solver: type, config: Mapping[str, Any]) -> Any:
    parameters = _parameters(solver.__init__)
    arguments = {name: value for name, value in config.items() if name in parameters}
    for name in ARGUMENTS.keys() & arguments.keys() - {"solver_config", "weights", "solver"}:
        check_value(name, arguments[name], ARGUMENTS[name])
    try:
        return solver(**arguments)
    except _ERRORS as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError("scheduler", solver.__name__, f"cannot be built: {said}") from None
