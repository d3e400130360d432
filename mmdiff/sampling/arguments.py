"""Checks of the pipeline's arguments and samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.values import plain


def scales(key: str, value: Any) -> Any:
    """A number or {modality: number}, none below 0.

    Raises:
        InputError: naming the modality.
    """
    value = plain(key, value)
    for name, scale in value.items() if isinstance(value, Mapping) else [("", value)]:
        if not isinstance(name, str):
            raise InputError(key, name, "is no name of a modality")
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
    if not isinstance(value, list | tuple) or not all(isinstance(item, torch.Generator) for item in value):
        raise InputError("generator", type(value).__name__, "needs a torch.Generator, or a list of one per sample")
    if len(value) != count:
        raise InputError("generator", f"{len(value)} generators", f"needs one, or one per sample: {count}")
    return list(value)


def check_finite(samples: Mapping[str, Tensor]) -> None:
    """Refuse samples with NaN or infinity.

    Raises:
        InputError: naming the modality.
    """
    for name, value in samples.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            remedy = "sampling diverged; lower the guidance, take more steps or another solver"
            raise InputError(f"samples.{name}", "NaN or infinity", remedy)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """One line for a request that does not fit into memory.

    Raises:
        InputError: if memory cannot be allocated.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        remedy = "does not fit into the memory; take fewer samples, or set max_batch_size"
        raise InputError("batch_size", str(error).splitlines()[0], remedy) from None
