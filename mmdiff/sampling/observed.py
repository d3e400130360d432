"""Observed values of a call to the pipeline as tensors of one batch size."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdiff.errors import InputError, at
from mmdiff.modalities import Condition
from mmdiff.modalities.query import asked
from mmdiff.model import MTDiffusionModel
from mmdiff.values import dense, plain


def observed_values(model: MTDiffusionModel, observed: Mapping[str, Any], batch_size: int | None) -> dict[str, Tensor]:
    """{modality: values (B, …)}, on the model's device.

    Args:
        model: the networks.
        observed: {modality: one raw value, a list of them, or a tensor of values}; single values are broadcast.
        batch_size: B; None: the number of values.

    Raises:
        InputError: naming the modality.
    """
    if not isinstance(observed, Mapping):
        raise InputError("observed", observed, "needs {modality: value}")
    values = {}
    for name, raw in observed.items():
        if name not in model.names:
            raise InputError(f"observed.{name}", raw, f"choose from {', '.join(model.names)}")
        values[name] = _values(model, name, raw)
    counts = {name: len(value) for name, value in values.items() if len(value) != 1}
    count = batch_size or max(counts.values(), default=1)
    for name, length in counts.items():
        if length != count:
            raise InputError(f"observed.{name}", f"{length} values", f"does not match {count} samples")
    return {name: value.expand(count, *value.shape[1:]) if len(value) == 1 else value for name, value in values.items()}


def _values(model: MTDiffusionModel, name: str, raw: Any) -> Tensor:
    modality: Condition = model.modalities[name]
    with at(f"observed.{name}", join=None):
        raw = _stacked(raw)
        if isinstance(raw, Tensor):
            value = _as_batch(name, raw, modality)
            modality.check(value)
            modality.check_observed(value)
        else:
            items = _separate(raw, len(modality.value_shape))
            if not items:
                raise InputError(name, raw, "is empty; leave the modality out to draw it")
            value = torch.stack([modality.preprocess(plain(name, item)) for item in items])
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(name, "NaN or infinity", "every number must be finite")
    return value.to(model.device, model.value_dtype if value.is_floating_point() else None)


def _stacked(raw: Any) -> Any:
    """A list of tensors of one shape as one tensor."""
    many = isinstance(raw, list | tuple) and raw and all(isinstance(item, Tensor) for item in raw)
    return torch.stack(list(raw)) if many and len({item.shape for item in raw}) == 1 else raw


def _as_batch(name: str, raw: Tensor, modality: Condition) -> Tensor:
    """(B, …), whole numbers of any width as int64.

    Raises:
        InputError: for a tensor without values.
    """
    dense(name, raw)
    if not raw.numel():
        raise InputError(name, f"a tensor of shape {tuple(raw.shape)}", "is empty; leave the modality out to draw it")
    value = raw if raw.ndim > len(modality.value_shape) else raw[None]
    whole = not (raw.is_floating_point() or raw.is_complex() or raw.dtype == torch.bool)
    return value.to(modality.placeholder().dtype) if whole and not modality.placeholder().is_floating_point() else value


def _separate(raw: Any, dimensions: int) -> list[Any]:
    """The raw values of a batch: the items of a list or of an array (B, …), or one value."""
    if isinstance(raw, np.ndarray):
        return list(raw) if raw.ndim > max(dimensions, 0) else [raw]
    if isinstance(raw, list | tuple):
        return [raw] if 0 < _depth(raw) <= dimensions else list(raw)
    return [raw]


def _depth(raw: Any, levels: int = 8) -> int:
    """Depth of nested lists of numbers; 0 for anything else."""
    if isinstance(raw, list | tuple):
        inner = _depth(raw[0], levels - 1) if raw and levels else 0
        return inner + 1 if inner or (raw and isinstance(raw[0], int | float | np.number)) else 0
    return 0


def weights_of(
    model: MTDiffusionModel, values: Mapping[str, Tensor], concatenated: Collection[str]
) -> dict[str, Tensor]:
    """{modality with parts: weight of each part of its values (B, n)}, as the network sees them.

    Args:
        model: the networks.
        values: of the observed modalities.
        concatenated: conditions in the observation channels.
    """
    seen = {n: torch.ones(len(values[n]), dtype=torch.bool, device=values[n].device) for n in concatenated}
    weights = {name: asked(model.modalities, name, values, seen).weights(value) for name, value in values.items()}
    return {name: own for name, own in weights.items() if own is not None}
