"""The heads read from a finished or an observed anchor: in one evaluation, or over several noise levels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.model import MTDiffusionModel
from mmdiff.sampling.guidance import branches
from mmdiff.schedulers import MTScheduler


def read_levels(read_timesteps: Sequence[int] | None, model: MTDiffusionModel, total: int) -> tuple[int, ...] | None:
    """The timesteps at which the anchor is read, or None: from its observation channels, as it was trained.

    Raises:
        InputError: where one lies outside 0 … total − 1.
    """
    if read_timesteps is None:
        return None if model.anchor in model.observable else (0,)
    levels = tuple(read_timesteps) if isinstance(read_timesteps, Sequence) else (read_timesteps,)
    if not levels or not all(type(level) is int and 0 <= level < total for level in levels):
        raise InputError("read_timesteps", read_timesteps, f"needs one or several whole numbers, 0 … {total - 1}")
    return levels


def heads(
    model: MTDiffusionModel, scheduler: MTScheduler, values: Mapping[str, Tensor], shown: Iterable[str]
) -> dict[str, Tensor]:
    """{auxiliary: params} in one evaluation at t = T: nothing is denoised, z_T is its mean 0, all not shown is absent.

    Args:
        model, scheduler: of the pipeline.
        values: of the observed modalities.
        shown: those in observation channels.
    """
    count = len(next(iter(values.values())))
    z = torch.zeros(count, *model.space, device=model.device, dtype=model.value_dtype)
    return _params(model, z, scheduler.terminal_timestep, values, shown)


def heads_of_noised_anchor(
    model: MTDiffusionModel,
    scheduler: MTScheduler,
    values: Mapping[str, Tensor],
    shown: Iterable[str],
    levels: Iterable[int],
    noises: Iterable[Tensor],
) -> dict[str, Tensor]:
    """{auxiliary: params}: p_θ(x_i | z_t) averaged over timesteps, z_t the anchor with ``noises`` (B, C, H, W) each."""
    z_0 = model.modalities[model.anchor].encode(values[model.anchor])
    found = []
    for level, noise in zip(levels, noises, strict=False):
        z_t = scheduler.add_noise(z_0, noise, torch.full((len(z_0),), level, device=z_0.device))
        found.append(_params(model, z_t, level, values, shown))
    return {name: model.modalities[name].average([params[name] for params in found]) for name in found[0]}


def _params(
    model: MTDiffusionModel, z_t: Tensor, level: int, values: Mapping[str, Tensor], shown: Iterable[str]
) -> dict[str, Tensor]:
    told = branches(model, values, (), shown, (), like=z_t)
    return model(z_t, torch.full((len(z_t),), level, device=z_t.device), told.observation).params
