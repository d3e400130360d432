"""Arguments of a call to the pipeline as numpy, torch and Python people pass them, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdiff.errors import InputError


def plain(key: str, value: Any) -> Any:
    """An argument with Python's own numbers.

    Args:
        key: its name, for errors.
        value: a number of numpy or torch, a sequence or mapping of such, or anything else, which is returned as it is.

    Raises:
        InputError: for NaN or infinity.
    """
    if isinstance(value, Mapping):
        return {name: plain(f"{key}.{name}", inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(key, inner) for inner in value)
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(key, value, "must be a finite number")
    return value


def whole(key: str, value: Any, least: int) -> int:
    """A whole number.

    Raises:
        InputError: for anything else, and below ``least``.
    """
    value = plain(key, value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise InputError(key, value, f"needs a whole number, {least} at least and below 2^31")
    return value


def switch(key: str, value: Any) -> bool:
    """True or False.

    Raises:
        InputError: for anything else: a text such as "no" is true in Python.
    """
    value = plain(key, value)
    if not isinstance(value, bool):
        raise InputError(key, value, "choose True or False")
    return value


def scales(key: str, value: Any) -> Any:
    """A number, or {modality: number}, none below 0.

    Raises:
        InputError: naming the modality.
    """
    value = plain(key, value)
    for name, scale in value.items() if isinstance(value, Mapping) else [("", value)]:
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale <= 1e4:
            raise InputError(f"{key}.{name}".rstrip("."), scale, "needs a number, 0 at least and 10000 at most")
    return value


def generators(value: Any, count: int) -> torch.Generator | list[torch.Generator] | None:
    """One generator, or a list of one per sample.

    Raises:
        InputError: for another number of them, or anything else.
    """
    if value is None or isinstance(value, torch.Generator):
        return value
    found = list(value) if isinstance(value, list | tuple) else None
    if found is None or not all(isinstance(one, torch.Generator) for one in found):
        raise InputError("generator", type(value).__name__, "needs a torch.Generator, or a list of one per sample")
    if len(found) != count:
        raise InputError("generator", f"{len(found)} generators", f"needs one, or one per sample: {count}")
    return found


def check_finite(samples: Mapping[str, Tensor]) -> None:
    """Refuse to return samples with NaN or infinity.

    Raises:
        InputError: naming the modality.
    """
    for name, value in samples.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            remedy = "sampling diverged; lower the guidance, take more steps or another solver"
            raise InputError(f"samples.{name}", "NaN or infinity", remedy)
