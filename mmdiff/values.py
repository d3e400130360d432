"""Checks of arguments: numbers of Python, numpy and torch, names, switches, dtypes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmdiff.errors import InputError

_DEEPEST = 8  # levels of nested lists and mappings


def plain(key: str, value: Any, levels: int = _DEEPEST) -> Any:
    """An argument with Python numbers.

    Args:
        key: of the argument, for errors.
        value: a number of numpy, torch or the standard library, or a sequence or mapping of these; anything else is
            returned unchanged.
        levels: of nesting that are allowed.

    Raises:
        InputError: for NaN or infinity, and for a tensor without values.
    """
    if isinstance(value, Mapping | list | tuple) and levels == 0:
        raise InputError(key, type(value).__name__, "is nested too deep")
    if isinstance(value, Mapping):
        return {name: plain(f"{key}.{name}", inner, levels - 1) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        items = [plain(key, inner, levels - 1) for inner in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        value = dense(key, value).item()
    if isinstance(value, Decimal | Fraction):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(key, value, "must be a finite number")
    return value


def dense(key: str, value: Any) -> Any:
    """The array or tensor, unless it is a tensor without dense values.

    Raises:
        InputError: for a tensor on the meta device, a sparse one, and 8-bit or quantized floats.
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
    items = [value] if isinstance(value, str) else list(value) if several else []
    if not (items or several) or not all(isinstance(item, str) for item in items):
        raise InputError(key, value, "needs a name or several names")
    return items


def check_names(arguments: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse unknown keyword arguments.

    Args:
        arguments: {name: value}.
        known: names.

    Raises:
        InputError: with the nearest name.
    """
    known = tuple(known)
    for key, value in arguments.items():
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


DTYPES = {
    **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
    **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float64", "double"), torch.float64),
}


def dtypes(torch_dtype: Any, dtype: Any = None) -> dict[str, torch.dtype | None]:
    """{component: dtype} of diffusers' arguments; None: the dtype of the built weights.

    Args:
        torch_dtype, dtype: either of them: a dtype, its name, "auto" (None), or {component: one of these}, in which
            "default" stands for the others.

    Raises:
        InputError: for anything else, and if the two disagree.
    """
    if torch_dtype is not None and dtype is not None and dtypes(torch_dtype) != dtypes(dtype):
        raise InputError("dtype", dtype, f"contradicts torch_dtype = {torch_dtype}; pass one of them")
    chosen = dtype if torch_dtype is None else torch_dtype
    named = chosen if isinstance(chosen, Mapping) else {"default": chosen}
    for name in set(named) - {"default", "model", "autoencoder"}:
        raise InputError(f"torch_dtype.{name}", named[name], "names no network; choose default, model or autoencoder")
    return {name: _dtype(named.get(name, named.get("default"))) for name in ("model", "autoencoder")}


def _dtype(name: Any) -> torch.dtype | None:
    if name is None or (isinstance(name, str) and name == "auto"):
        return None
    dtype = DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else name
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    raise InputError("torch_dtype", name, f"choose a floating torch dtype, auto or one of {', '.join(DTYPES)}")


def in_dtype(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The network in a dtype; None: unchanged."""
    return network if dtype is None else nn.Module.to(network, dtype)
