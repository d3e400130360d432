"""Types of the schedulers' arguments, and the check of a value against its type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError

from mmdiff.errors import InputError
from mmdiff.values import dense, plain

_SWITCH = Annotated[bool, Field(strict=True)]
_NUMBER = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_VARIANCE = Annotated[float, Field(strict=True, ge=0, le=1)]
ARGUMENTS = {  # of both schedulers; the allowed texts are checked elsewhere
    "num_train_timesteps": Annotated[int, Field(strict=True, ge=1, le=100_000)],
    "beta_schedule": str,
    "beta_start": _VARIANCE,
    "beta_end": _VARIANCE,
    "trained_betas": Annotated[list[_VARIANCE], Field(strict=True)] | None,
    "rescale_betas_zero_snr": _SWITCH,
    "prediction_type": str,
    "timestep_spacing": str,
    "clip_sample": _SWITCH,
    "clip_sample_range": Annotated[float, Field(strict=True, gt=0, le=1e4)],
    "weights": dict[str, dict[str, Any]] | None,
    "solver": str,
    "solver_config": dict[str, Any] | None,
    "literal_alpha": _SWITCH,
    "allow_nonzero_terminal": _SWITCH,
    "timestep_sampling": str,
    "logit_mean": _NUMBER,
    "logit_std": Annotated[float, Field(strict=True, gt=0, le=1e4)],
}


def check_value(key: str, value: Any, annotation: Any, reason: str | None = None) -> None:
    """Refuse a value that is not of its type.

    Args:
        key: of the value, for errors.
        value: any.
        annotation: a type that pydantic knows.
        reason: added to the message.

    Raises:
        InputError: with pydantic's message.
    """
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise InputError(key, value, f"{problem}; {reason}" if reason else problem) from None


def plain_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The checked arguments of a scheduler; numbers and arrays of numpy and torch as Python's own.

    Raises:
        InputError: naming the argument.
    """
    arguments = {key: _lists(key, plain(key, config[key])) for key in ARGUMENTS if key in config}
    for key, value in arguments.items():
        check_value(key, value, ARGUMENTS[key])
    return arguments


def _lists(key: str, value: Any) -> Any:
    """Sequences, arrays and tensors as lists."""
    if isinstance(value, Mapping):
        return {name: _lists(f"{key}.{name}", inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | range):
        return [_lists(key, inner) for inner in value]
    return plain(key, dense(key, value).tolist()) if isinstance(value, np.ndarray | torch.Tensor) else value
