"""Muon: its direction is the orthogonal factor of the momentum, its size AdamW's, and the rest is AdamW itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdiff.training.muon import Muon, orthogonalised


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 24), (16, 90), (90, 16)])
def test_the_direction_is_the_orthogonal_factor(shape: tuple[int, int], dtype: torch.dtype) -> None:
    exact, batch = dtype == torch.float32, torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(batch[0].double(), full_matrices=False)
    for spread in (0, -3, -6):  # of the singular values: in bfloat16 small ones must not explode
        s = s if spread == 0 else torch.logspace(0, spread, len(s)).double()
        batch[0] = (u * s @ v).float()
        directions = orthogonalised(batch, dtype).double()
        found = u.mT @ directions[0] @ v.mT  # diagonal where the singular vectors are kept
        kept = s > 0.05 * s.max()  # five steps do not lift what is nearly 0
        assert (found - found.diag().diag()).abs().max() < (1e-3 if exact else 0.15)
        assert found.diag()[kept].min() > (0.6 if exact else 0.5)
        assert torch.linalg.svdvals(directions).max() < 1.25
    for one, together in zip(batch, directions, strict=True):  # a batch is its matrices
        torch.testing.assert_close(orthogonalised(one, dtype).double(), together, rtol=0, atol=1e-3 if exact else 0.1)


def test_the_direction_does_not_depend_on_the_scale() -> None:
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    once, scaled = (orthogonalised(scale * matrix, torch.float32) for scale in (1, 1e3))
    assert torch.allclose(once, scaled, atol=1e-4)


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
    assert kernel.square().mean().sqrt().item() == pytest.approx(0.2 * 1e-2, rel=0.25)


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
    assert torch.allclose(kernel, expected, atol=0.05)  # bfloat16, where the CPU has units for it


def test_weight_decay_is_decoupled() -> None:
    kernel = nn.Parameter(torch.ones(16, 16))
    kernel.grad = torch.zeros(16, 16)
    Muon([kernel], [], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(kernel, torch.full((16, 16), 0.95))


def test_a_parameter_without_a_gradient_stays() -> None:
    kernel, other = nn.Parameter(torch.ones(16, 16)), nn.Parameter(torch.ones(3))
    Muon([kernel], [other], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(kernel, torch.ones(16, 16)) and torch.equal(other, torch.ones(3))
