"""FLOPs by hand, and a peak that a matrix product cannot beat."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from mmdiff.training.flops import flops_of, matrix_peak, now, training_flops


def test_flops_are_those_of_the_equations_and_a_training_step_counts_three_forward_passes() -> None:
    x, q = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 6, 16, requires_grad=True)
    layer = nn.Conv2d(3, 5, 3, padding=1)
    convolution = 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)
    attention = 2 * 2 * (2 * 4) * 6 * 6 * 16  # Q Kᵀ and P V
    assert flops_of(lambda: layer(x)) == convolution
    assert training_flops(lambda: layer(x)) == 3 * convolution
    forward = flops_of(lambda: scaled_dot_product_attention(q, q, q))
    both = flops_of(lambda: scaled_dot_product_attention(q, q, q).sum().backward())
    assert forward == attention and both == 3 * attention  # nothing that was computed again


def test_no_product_of_other_matrices_is_much_faster_than_the_peak() -> None:
    device, a = torch.device("cpu"), torch.randn(768, 768)
    peak = matrix_peak(device, rounds=3)
    started = now(device)
    a @ a
    assert 1e8 < 2 * 768**3 / (now(device) - started) < 3 * peak
