"""Diffused modalities in one training step: whose time is the anchor's, whose is its own, and z^i at it, Eq. (25)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmdiff.model import MTDiffusionModel
from mmdiff.observation import Noisy
from mmdiff.randomness import normal, uniforms
from mmdiff.schedulers import MTScheduler
from mmdiff.states import draw_times

Flags = dict[str, Tensor]  # {modality: (B,) bool}


class OwnTimes(NamedTuple):
    """States of all modalities, revised: one with the anchor's time or its own is neither observed nor aggregated.

    ``timesteps`` {diffused modality: (B,)}, and ``share`` of T: 0 where it is observed, 1 where it is absent.
    """

    aggregated: Flags
    observed: Flags
    timesteps: dict[str, Tensor]
    share: dict[str, Tensor]


def draw_own_times(
    scheduler: MTScheduler,
    names: list[str],
    states: tuple[Flags, Flags, Tensor],
    present: Flags,
    timesteps: Tensor,
    probabilities: tuple[float, float],
    seed: int,
    step: int,
    positions: Tensor,
) -> OwnTimes:
    """The times of diffused modalities, as functions of (seed, step, name, position).

    Args:
        scheduler: of the anchor; other modalities follow the same path.
        names: the diffused modalities.
        states: (aggregated, observed, denoised), as the state distribution drew them.
        present: which rows have a value; a missing one is absent.
        timesteps: of the anchor, (B,).
        probabilities: of equal times, and of own times, see `mmdiff.states.draw_times`.
        seed, step, positions: of the batch.
    """
    aggregated, observed, denoised = states
    u = uniforms(seed, step, ["equal times", *(f"times/{name}" for name in names)], positions, (2,))  # (1 + D, B, 2)
    seen = torch.stack([observed[name] for name in names])
    times = draw_times(u[0, :, 0], u[1:, :, 0], seen, denoised, *probabilities)
    drawn = OwnTimes(dict(aggregated), dict(observed), {}, {})
    for index, name in enumerate(names):
        moving = (times.equal[index] | times.own[index]) & present[name]
        drawn.aggregated[name], drawn.observed[name] = aggregated[name] & ~moving, observed[name] & ~moving
        own = scheduler.training_timesteps(u[1 + index, :, 1])
        drawn.timesteps[name] = torch.where(times.own[index], own, timesteps)
        still = 1.0 - drawn.observed[name].float()
        drawn.share[name] = torch.where(moving, scheduler.share(drawn.timesteps[name]), still)
    return drawn


def noisy_signals(
    model: MTDiffusionModel,
    scheduler: MTScheduler,
    values: Mapping[str, Tensor],
    times: OwnTimes,
    seed: int,
    step: int,
    positions: Tensor,
) -> dict[str, Noisy]:
    """{diffused modality: z^i at its time}, from noise that is independent by name; the signal itself at time 0."""
    noisy = {}
    for name, timesteps in times.timesteps.items():
        signal, share = model.signal(name, values[name]), times.share[name]
        noise = normal(seed, step, f"noise/{name}", positions, signal.shape[1:])
        sample = scheduler.add_noise(signal, noise, timesteps)
        clean = (share == 0).reshape(-1, *(1,) * (signal.ndim - 1))
        noisy[name] = Noisy(torch.where(clean, signal, sample), share)
    return noisy
