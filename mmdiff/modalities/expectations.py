"""What the laws of `contract` share: values, params and noise to try, and a fault in words."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from mmdiff.modalities.base import Condition, Modality, Shape

ROWS = 64


class Fault(Exception):
    """A law is broken; the message says how."""


def examples_of(modality: Condition, count: int = ROWS, seed: int = 1) -> Tensor:
    return modality.examples(count, Generator().manual_seed(seed))


def params_of(modality: Modality, shape: Shape, count: int = ROWS) -> Tensor:
    generator = Generator().manual_seed(2)
    _, height, width = shape.space
    grid = (height // shape.stride, width // shape.stride)
    features = torch.randn(count, shape.features, *grid, generator=generator)
    return modality.decode(features, torch.randn(count, shape.pooled, generator=generator))


def noise_of(modality: Modality, count: int = ROWS, seed: int = 3) -> Tensor:
    return torch.randn(count, *modality.noise_shape, generator=Generator().manual_seed(seed))


def expect(condition: bool, fault: str) -> None:
    if not condition:
        raise Fault(fault)


def expect_shape(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    expect(isinstance(tensor, Tensor), f"{name} gives {type(tensor).__name__}, expected a tensor of shape {wanted}")
    expect(tuple(tensor.shape) == wanted, f"{name} gives shape {tuple(tensor.shape)}, expected {wanted}")
    expect(not tensor.is_floating_point() or bool(tensor.isfinite().all()), f"{name} gives NaN or infinity")


def equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-5)
