"""Muon: its direction is the orthogonal factor of the momentum, its size AdamW's, and the rest is AdamW itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdiff.training.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(24, 24), (16, 90), (90, 16)])
def test_the_direction_is_the_orthogonal_factor(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = u.mT @ orthogonalised(matrix).double() @ v.mT  # diagonal where the singular vectors are kept
    kept = s > 0.05 * s.max()  # five steps do not lift what is nearly 0
    assert (found - found.diag().diag()).abs().max() < 1e-4
    assert found.diag()[kept].min() > 0.6 and found.diag().max() < 1.25


def test_the_direction_does_not_depend_on_the_scale() -> None:
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(orthogonalised(matrix), orthogonalised(1e3 * matrix), atol=1e-4)


def test_all_else_is_adamw() -> None:
    parameters = [nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4)), nn.Parameter(torch.ones(5))]
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    arguments = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizers = Muon(parameters[:1], parameters[1:], **arguments), torch.optim.AdamW(twins, **arguments, fused=True)
    for step in range(3):  # the matrix has too few rows
        for p, twin in zip(parameters, twins, strict=True):
            p.grad = twin.grad = torch.cos(p.detach() * (step + 1))
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, twin) for p, twin in zip(parameters, twins, strict=True))


def test_a_kernel_moves_as_far_as_under_adamw() -> None:
    kernel = nn.Parameter(torch.zeros(32, 16, 3, 3))
    optimizer = Muon([kernel], [], lr=1e-2, weight_decay=0.0)
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0)) * 1e-6
    optimizer.step()
    assert kernel.square().mean().sqrt().item() == pytest.approx(0.2 * 1e-2, rel=0.2)


def test_the_momentum_is_nesterovs() -> None:
    """m ← μ m + (1 − μ) g, and the direction is that of (1 − μ) g + μ m: written out for three gradients."""
    gradients = torch.randn(3, 16, 20, generator=torch.Generator().manual_seed(0))
    kernel, expected, momentum = nn.Parameter(torch.zeros(16, 20)), torch.zeros(16, 20), torch.zeros(16, 20)
    optimizer = Muon([kernel], [], lr=1.0, weight_decay=0.0, momentum=0.8)
    for gradient in gradients:
        kernel.grad = gradient.clone()
        optimizer.step()
        momentum = 0.8 * momentum + 0.2 * gradient
        expected -= 0.2 * 20**0.5 * orthogonalised(0.2 * gradient + 0.8 * momentum)
    assert torch.allclose(kernel, expected, atol=1e-4)


def test_weight_decay_is_decoupled() -> None:
    kernel = nn.Parameter(torch.ones(16, 16))
    kernel.grad = torch.zeros(16, 16)
    Muon([kernel], [], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(kernel, torch.full((16, 16), 0.95))


def test_a_parameter_without_a_gradient_stays() -> None:
    kernel, other = nn.Parameter(torch.ones(16, 16)), nn.Parameter(torch.ones(3))
    Muon([kernel], [other], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(kernel, torch.ones(16, 16)) and torch.equal(other, torch.ones(3))
