"""Observed values of a call to the pipeline: raw things as tensors of one batch size, and what mattered in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.modalities import Modality
from mmdiff.model import MTDiffusionModel


def observed_values(model: MTDiffusionModel, observed: Mapping[str, Any], batch_size: int | None) -> dict[str, Tensor]:
    """{modality: values (B, …)}, on the model's device.

    Args:
        model: the networks.
        observed: {modality: one raw value, a list of them, or a tensor of values}; single values are broadcast.
        batch_size: B, or None: what the values have.

    Raises:
        InputError: naming the modality.
    """
    values = {}
    for name, raw in observed.items():
        if name not in model.names:
            raise InputError(f"observed.{name}", raw, f"choose from {', '.join(model.names)}")
        values[name] = _values(model, name, raw)
    counts = {name: len(value) for name, value in values.items() if len(value) != 1}
    count = batch_size or max(counts.values(), default=1)
    for name, found in counts.items():
        if found != count:
            raise InputError(f"observed.{name}", f"{found} values", f"does not match {count} samples")
    return {name: value.expand(count, *value.shape[1:]) if len(value) == 1 else value for name, value in values.items()}


def _values(model: MTDiffusionModel, name: str, raw: Any) -> Tensor:
    modality: Modality = model.modalities[name]
    try:
        if not isinstance(raw, Tensor):
            many = raw if isinstance(raw, list | tuple) else [raw]
            if not many:
                raise InputError(name, raw, "is empty; leave the modality out to draw it")
            value = torch.stack([modality.preprocess(item) for item in many])
        else:
            value = raw if raw.ndim > len(modality.value_shape) else raw[None]
            modality.check(value)
    except InputError as error:
        raise InputError(f"observed.{name}", error.value, error.remedy) from None
    return value.to(model.device, model.value_dtype if value.is_floating_point() else None)


def weights_of(model: MTDiffusionModel, values: Mapping[str, Tensor], size: int | None = None) -> dict[str, Tensor]:
    """{modality: how much each part of its values matters (B, n)}, of those that have parts, ``size`` rows at once."""
    found = {
        name: [model.modalities[name].weights(part) for part in v.split(size or len(v))] for name, v in values.items()
    }
    return {name: torch.cat(parts) for name, parts in found.items() if parts[0] is not None}
