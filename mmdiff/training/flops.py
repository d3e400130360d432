"""Model FLOPs utilisation (MFU; Chowdhery et al., 2022, arXiv 2204.02311): FLOPs per second over a measured peak.

One multiply-add is two FLOPs. A training step counts three times its forward pass: what checkpointing computes again is
no progress and does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BACKWARD = 2  # FLOPs of a backward pass, in forward passes
_SIDES = {"cpu": (512, 1024)}  # of the matrices
_LARGE_SIDES = (4096, 8192)


def flops_of(action: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and attention in a call, as torch counts them.

    Attention is computed as two matrix products, which every version of torch counts alike: take a small batch, FLOPs
    are proportional to it. Compiled modules hide their products; count before compiling.

    Args:
        action: called once.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def training_flops(forward: Callable[[], object]) -> int:
    """FLOPs of a training step, from its forward pass, which is called once without gradients."""
    with torch.no_grad():
        return (1 + BACKWARD) * flops_of(forward)


@torch.no_grad()
def matrix_peak(device: torch.device | str, dtype: torch.dtype = torch.float32, rounds: int = 5) -> float:
    """FLOPs per second of square matrix products: the fastest round of the best size.

    On an accelerator float32 follows `torch.set_float32_matmul_precision`, on a CPU the number of threads.

    Args:
        device: cpu, cuda, …
        dtype: of the matrices.
        rounds: at least 1; one more warms up.
    """
    device = torch.device(device)
    best = 0.0
    for side in _SIDES.get(device.type, _LARGE_SIDES):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        count = 2 if device.type == "cpu" else 10
        for index in range(rounds + 1):
            started = now(device)
            for _ in range(count):
                a @ b
            seconds = now(device) - started
            if index > 0:
                best = max(best, count * 2 * side**3 / seconds)
    return best


def now(device: torch.device) -> float:
    """Seconds of wall time, once the accelerator has done all that was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
