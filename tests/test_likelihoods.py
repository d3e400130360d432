"""Likelihoods against torch.distributions, and masses that sum to one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from mmdiff.likelihoods import (
    Gaussian,
    categorical_log_prob,
    discretised_gaussian_log_prob,
    mean_except_batch,
    sum_except_batch,
)

SHAPE = (4, 2, 3, 3)
variance_shapes = pytest.mark.parametrize("variance_shape", [(), (4, 1, 1, 1), SHAPE])


def gaussian(seed: int, variance_shape: tuple[int, ...]) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return Gaussian(mean, 0.1 + torch.rand(variance_shape, generator=generator, dtype=torch.float64))


def reference(law: Gaussian) -> Independent:
    return Independent(Normal(law.mean, law.variance.sqrt().expand_as(law.mean)), law.mean.ndim - 1)


@variance_shapes
def test_log_prob_is_that_of_torch(variance_shape: tuple[int, ...]) -> None:
    law, value = gaussian(0, variance_shape), gaussian(1, ()).mean
    torch.testing.assert_close(law.log_prob(value), reference(law).log_prob(value), rtol=1e-12, atol=0)


@variance_shapes
@pytest.mark.parametrize("other_shape", [(), (4, 1, 1, 1), SHAPE])
def test_kl_is_that_of_torch(variance_shape: tuple[int, ...], other_shape: tuple[int, ...]) -> None:
    p, q = gaussian(0, variance_shape), gaussian(1, other_shape)
    expected = kl_divergence(reference(p), reference(q))
    assert p.kl(q).shape == (4,)
    torch.testing.assert_close(p.kl(q), expected, rtol=1e-12, atol=0)


def test_kl_to_a_law_with_one_mean_for_all_counts_every_sample() -> None:
    """KL to N(0, I) is asked for with a scalar mean or one row; the sum runs over this law's dimensions."""
    p = gaussian(0, (4, 1, 1, 1))
    standard = Gaussian(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    full = Gaussian(torch.zeros_like(p.mean), torch.ones_like(p.mean))
    torch.testing.assert_close(p.kl(standard), p.kl(full), rtol=1e-15, atol=0)


@variance_shapes
def test_sample_is_mean_plus_scaled_noise(variance_shape: tuple[int, ...]) -> None:
    law = gaussian(0, variance_shape)
    noise = gaussian(1, ()).mean
    torch.testing.assert_close((law.sample(noise) - law.mean) ** 2, law.variance * noise**2, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("std", [0.3, 0.01, 0.001])
@pytest.mark.parametrize("mean", [-1.4, -1.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("levels", [256, 2])
def test_discretised_masses_sum_to_one(mean: float, std: float, levels: int) -> None:
    grid = torch.linspace(-1, 1, levels, dtype=torch.float64)
    law = torch.full_like(grid, mean), torch.full_like(grid, std**2)
    mass = discretised_gaussian_log_prob(*law, grid, levels).exp()
    assert float(mass.sum()) == pytest.approx(1, abs=1e-12)  # 256 differences of numbers below 1, in float64


def test_discretised_mass_of_a_wide_law_is_density_times_bin() -> None:
    grid = torch.linspace(-1, 1, 256, dtype=torch.float64)[1:-1]
    law = Gaussian(torch.zeros_like(grid), torch.full_like(grid, 0.25))
    density = law.log_prob(grid[:, None].squeeze(1))
    mass = discretised_gaussian_log_prob(law.mean, law.variance, grid)
    # the midpoint rule's relative error is h²/24 · |p''/p| ≤ (2/255)²/24 · (1/0.25²) · (1 + 4) with x² ≤ 1 and σ = ½
    bound = (2 / 255) ** 2 / 24 * (1 / 0.25) * (1 + 4)
    torch.testing.assert_close(mass, density + torch.tensor(2 / 255).double().log(), rtol=0, atol=bound)


def test_discretised_images_from_bytes_meet_the_grid_in_float32() -> None:
    """8-bit pixels as a data set delivers them: the edge bins must take the tails in spite of rounding."""
    grid = torch.arange(256, dtype=torch.float32) / 127.5 - 1
    mass = discretised_gaussian_log_prob(torch.full_like(grid, 0.9), torch.full_like(grid, 0.25), grid).exp()
    assert float(mass.double().sum()) == pytest.approx(1, abs=256 * 2**-23)


def test_discretised_log_mass_is_finite_far_away() -> None:
    far = discretised_gaussian_log_prob(torch.tensor([-1.0]), torch.tensor([1e-6]), torch.tensor([1.0]))
    assert far.isfinite().all() and float(far) < -80  # log of float32's smallest normal number is −87.3


@pytest.mark.parametrize("pixels", [(), (3, 3)])
def test_categorical_gathers_log_softmax(pixels: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, *pixels, generator=generator, dtype=torch.float64)
    value = torch.randint(7, (5, *pixels), generator=generator)
    expected = logits.log_softmax(1).gather(1, value[:, None]).squeeze(1)
    torch.testing.assert_close(categorical_log_prob(logits, value), expected, rtol=1e-13, atol=0)
    by_torch = Categorical(logits=logits.movedim(1, -1)).log_prob(value)
    torch.testing.assert_close(expected, by_torch, rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4, 4)])
def test_reductions_keep_the_batch(shape: tuple[int, ...]) -> None:
    x: Tensor = torch.arange(3.0).reshape(3, *(1,) * (len(shape) - 1)).expand(shape)
    size = x[0].numel()
    assert sum_except_batch(x).tolist() == [0, size, 2 * size]
    assert mean_except_batch(x).tolist() == [0, 1, 2]
