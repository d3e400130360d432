"""Replacement with resampling: known parts of z_t are the noised known parts of z_0 (RePaint; Lugmayr et al., 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mmdiff.modalities import KnownPart
from mmdiff.schedulers import MTScheduler


def visits(steps: int, jump_length: int, jump_n_sample: int) -> list[tuple[int, int]]:
    """[(index of a solver step, number of steps to go back after it)], RePaint's schedule.

    At every ``jump_length``-th state, counted from the last step, the run goes back ``jump_length`` steps,
    ``jump_n_sample`` − 1 times.
    """
    left = dict.fromkeys(range(0, steps - jump_length, jump_length), jump_n_sample - 1)
    schedule, done = [], 0
    while done < steps:
        state = steps - done - 2  # after this step, counted from the last
        back = jump_length if left.get(state, 0) > 0 else 0
        if back:
            left[state] -= 1
        schedule.append((done, back))
        done += 1 - back
    return schedule


def replaced(
    scheduler: MTScheduler,
    sample: Tensor,
    now: int,
    known: Iterable[KnownPart],
    encodings: Mapping[str, Tensor],
    noise: Tensor,
) -> Tensor:
    """z_t whose known parts are drawn from q(z_t | z_0, X), Eq. (2); at t = 0 they are z_0's own.

    Args:
        scheduler: the forward process.
        sample: z_t (B, C, H, W).
        now: its timestep, −1 for t = 0.
        known: parts of z_0.
        encodings: of the modalities in c_t.
        noise: standard normal (B, C, H, W).
    """
    signal, sigma = scheduler.signal_and_noise(now)
    shift = scheduler.aggregate(encodings, now, sample) + sigma * noise
    for part in known:
        sample = torch.where(part.mask, signal * part.encoding + shift, sample)
    return sample


def renoised(
    scheduler: MTScheduler, sample: Tensor, now: int, then: int, encodings: Mapping[str, Tensor], noise: Tensor
) -> Tensor:
    """A draw from q(z_then | z_now, X) at a later t: the steps of Eq. (1) between them as one."""
    (signal, sigma), (later_signal, later_sigma) = scheduler.signal_and_noise(now), scheduler.signal_and_noise(then)
    ratio = later_signal / signal
    u = sample - scheduler.aggregate(encodings, now, sample)
    spread = math.sqrt(max(0.0, later_sigma**2 - (ratio * sigma) ** 2))
    return ratio * u + spread * noise + scheduler.aggregate(encodings, then, sample)
