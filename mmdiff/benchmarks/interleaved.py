"""Sides that take turns: seconds of each, so that a drift of the machine's speed falls on all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """{side: seconds of every round}, after a round that warms up; every second round goes backwards.

    On a CPU it is the process's own time, so that other processes count little; on an accelerator it is wall time.

    Args:
        sides: what is timed, once per round.
        rounds: at least 1.
        device: cpu, cuda, …
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds + 1):
        order = list(sides.items())
        for name, side in order if index % 2 == 0 else reversed(order):
            started = _now(device)
            side()
            seconds = _now(device) - started
            if index > 0:
                times[name].append(seconds)
    return times


def ratio(times: Mapping[str, list[float]], one: str, other: str) -> tuple[float, float, float]:
    """(median, lowest, highest) of the rounds' ratios of the seconds of two sides."""
    ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()
