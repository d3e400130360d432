"""Counter-based random numbers: each draw is a pure function of (seed, step, stream, position in the global batch).

Nothing here has state. Training draws the same noise, times and states if a global batch is computed at once, in
accumulated parts or on several processes, and a resumed run continues with the same numbers. The generator is
SplitMix64 (Steele et al., 2014), used as a hash of the counter.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
_MASK_64 = (1 << 64) - 1


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's ``>>`` on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: int64 -> int64, a bijection that scrambles every bit."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _signed(x: int) -> int:
    x &= _MASK_64
    return x - (1 << 64) if x >> 63 else x


def fold(seed: int, step: int, stream: str) -> int:
    """One 63-bit key for (seed, step, stream); streams are names such as ``"noise"`` and ``"times"``."""
    words = torch.tensor([_signed(seed), step, zlib.crc32(stream.encode())], dtype=torch.int64)
    key = torch.zeros((), dtype=torch.int64)
    for word in words:
        key = _mix(key + _GOLDEN + word)
    return int(key) & ((1 << 63) - 1)


def _bits(key: int, positions: Tensor, size: int) -> Tensor:
    """(B,) positions -> (B, size) random int64 words."""
    rows = _mix(positions.to(torch.int64) * _GOLDEN + key)  # one well-mixed word per sample
    columns = torch.arange(1, size + 1, device=positions.device, dtype=torch.int64) * _GOLDEN
    return _mix(rows[:, None] + columns)


def _unit(words: Tensor, shift: int) -> Tensor:
    """24 of the 64 bits as float32 in the open interval (0, 1)."""
    return ((_shift(words, shift) & 0xFFFFFF).to(torch.float32) + 0.5) * 2.0**-24


def uniform(seed: int, step: int, stream: str, positions: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform numbers in (0, 1), float32, shape (B, *shape), on the device of ``positions`` (B,)."""
    words = _bits(fold(seed, step, stream), positions, math.prod(shape))
    return _unit(words, 40).reshape(len(positions), *shape)


def normal(seed: int, step: int, stream: str, positions: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal numbers, float32, shape (B, *shape), by Box and Muller's transform of one word per pair."""
    size = math.prod(shape)
    words = _bits(fold(seed, step, stream), positions, (size + 1) // 2)
    radius = (-2.0 * _unit(words, 40).log()).sqrt()
    angle = (2.0 * math.pi) * _unit(words, 12)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)  # (B, ceil(size / 2), 2)
    return pairs.flatten(1)[:, :size].reshape(len(positions), *shape)
