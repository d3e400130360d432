"""Numbers, names and switches as numpy, torch and Python people pass them, checked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdiff.errors import InputError

_DEEPEST = 8  # levels of nested lists and mappings


def plain(key: str, value: Any, levels: int = _DEEPEST) -> Any:
    """An argument with Python's own numbers.

    Args:
        key: its name, for errors.
        value: a number of numpy, torch or the standard library, a sequence or mapping of such, or anything else, which
            is returned as it is.
        levels: of nesting that are allowed.

    Raises:
        InputError: for NaN or infinity, and a tensor that holds no values.
    """
    if isinstance(value, Mapping | list | tuple) and levels == 0:
        raise InputError(key, type(value).__name__, "is nested too deep")
    if isinstance(value, Mapping):
        return {name: plain(f"{key}.{name}", inner, levels - 1) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        found = [plain(key, inner, levels - 1) for inner in value]
        return found if isinstance(value, list) else tuple(found)
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        value = dense(key, value).item()
    if isinstance(value, Decimal | Fraction):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(key, value, "must be a finite number")
    return value


def dense(key: str, value: Any) -> Any:
    """An array or a tensor that holds its values.

    Raises:
        InputError: for a tensor on the meta device, a sparse one, and one of 8-bit or quantized floats.
    """
    if not isinstance(value, Tensor):
        return value
    if value.is_meta or value.layout != torch.strided:
        raise InputError(key, f"a {value.device.type} tensor, {value.layout}", "needs a dense tensor with values")
    if value.is_quantized or (value.is_floating_point() and value.element_size() == 1):
        raise InputError(key, f"a tensor of {value.dtype}", "cannot be computed with; convert it to float32")
    return value


def names(key: str, value: Any) -> list[str]:
    """One name or several.

    Raises:
        InputError: for anything else.
    """
    value = plain(key, value)
    value = value.tolist() if isinstance(value, np.ndarray) else value
    several = isinstance(value, Iterable) and not isinstance(value, Mapping | Tensor | bytes)
    found = [value] if isinstance(value, str) else list(value) if several else []
    if not (found or several) or not all(isinstance(one, str) for one in found):
        raise InputError(key, value, "needs a name or several names")
    return found


def check_names(given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse keyword arguments that nothing reads.

    Args:
        given: {name: value} as passed.
        known: all names that are read.

    Raises:
        InputError: with the nearest name.
    """
    known = tuple(known)
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
            raise InputError(str(key), value, f"unknown argument; {hint}")


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
