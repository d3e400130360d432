"""Counter-based random numbers: each draw is a pure function of (seed, step, stream, position in the global batch).

Nothing here has state. Training draws the same noise, times and states if a global batch is computed at once, in
accumulated parts or on several processes, and a resumed run continues with the same numbers. The generator is
SplitMix64 (Steele et al., 2014), used as a hash of the counter.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence

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
    """SplitMix64's finaliser: int64 -> int64, a bijection that scrambles every bit. ``x`` is overwritten."""
    x ^= _shift(x, 30)
    x *= _MIX_1
    x ^= _shift(x, 27)
    x *= _MIX_2
    x ^= _shift(x, 31)
    return x


def _mixed(x: int) -> int:
    """The same of a Python number, 0 … 2^64 − 1: no tensor, so that nothing waits for an accelerator."""
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK_64
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK_64
    return x ^ (x >> 31)


def fold(seed: int, step: int, stream: str) -> int:
    """One 63-bit key for (seed, step, stream); streams are names such as ``"noise"`` and ``"times"``."""
    key = 0
    for word in (seed, step, zlib.crc32(stream.encode())):
        key = _mixed((key + _GOLDEN + word) & _MASK_64)
    return key & (_MASK_64 >> 1)


def _bits(keys: Sequence[int], positions: Tensor, size: int) -> Tensor:
    """(B,) positions -> (keys, B, size) random int64 words."""
    counters = positions.to(torch.int64) * _GOLDEN
    rows = _mix(torch.stack([counters + key for key in keys]))  # one well-mixed word per key and sample
    columns = torch.arange(1, size + 1, device=positions.device, dtype=torch.int64) * _GOLDEN
    return _mix(rows[..., None] + columns)


def _unit(words: Tensor, shift: int) -> Tensor:
    """24 of the 64 bits as float32 in the open interval (0, 1)."""
    return ((words >> shift) & 0xFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-24)


def uniform(seed: int, step: int, stream: str, positions: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform numbers in (0, 1), float32, shape (B, *shape), on the device of ``positions`` (B,)."""
    return uniforms(seed, step, [stream], positions, shape)[0]


def uniforms(seed: int, step: int, streams: Sequence[str], positions: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """`uniform` of several streams at once: (streams, B, *shape)."""
    words = _bits([fold(seed, step, stream) for stream in streams], positions, math.prod(shape))
    return _unit(words, 40).reshape(len(streams), len(positions), *shape)


def uniform_number(seed: int, step: int, stream: str) -> float:
    """`uniform` of position 0 as a Python number, without a tensor."""
    word = _mixed((_mixed(fold(seed, step, stream)) + _GOLDEN) & _MASK_64)
    rounded = struct.unpack("f", struct.pack("f", ((word >> 40) & 0xFFFFFF) + 0.5))[0]  # to float32, as in `_unit`
    return rounded * 2.0**-24


def normal(seed: int, step: int, stream: str, positions: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal numbers, float32, shape (B, *shape), by Box and Muller's transform of one word per pair."""
    size = math.prod(shape)
    words = _bits([fold(seed, step, stream)], positions, (size + 1) // 2)[0]
    radius = _unit(words, 40).log_().mul_(-2.0).sqrt_()
    angle = _unit(words, 12).mul_(2.0 * math.pi)
    pairs = torch.stack([angle.cos(), angle.sin()], dim=-1).mul_(radius[..., None])  # (B, ceil(size / 2), 2)
    return pairs.flatten(1)[:, :size].reshape(len(positions), *shape)
