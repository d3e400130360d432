"""Likelihoods against torch.distributions, scipy and mpmath, and masses that sum to one."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
import scipy
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from mmdiff.likelihoods import (
    Gaussian,
    categorical_log_prob,
    discretised_gaussian_log_prob,
    log_bessel_i,
    mean_except_batch,
    sum_except_batch,
    vmf_log_prob,
    vmf_mean_length,
    vmf_sample,
)

SHAPE = (4, 2, 3, 3)
VARIANCES = [(), (4, 1, 1, 1), SHAPE]


def gaussian(seed: int, variance_shape: tuple[int, ...]) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return Gaussian(mean, 0.1 + torch.rand(variance_shape, generator=generator, dtype=torch.float64))


def reference(law: Gaussian) -> Independent:
    return Independent(Normal(law.mean, law.variance.sqrt().expand_as(law.mean)), law.mean.ndim - 1)


def test_log_prob_is_that_of_torch() -> None:
    for variance_shape in VARIANCES:
        law, value = gaussian(0, variance_shape), gaussian(1, ()).mean
        torch.testing.assert_close(law.log_prob(value), reference(law).log_prob(value), rtol=1e-12, atol=0)


def test_kl_is_that_of_torch() -> None:
    for variance_shape, other_shape in itertools.product(VARIANCES, VARIANCES):
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


def test_sample_is_mean_plus_scaled_noise() -> None:
    for variance_shape in VARIANCES:
        law = gaussian(0, variance_shape)
        noise = gaussian(1, ()).mean
        torch.testing.assert_close((law.sample(noise) - law.mean) ** 2, law.variance * noise**2, rtol=1e-12, atol=1e-15)


def test_discretised_masses_sum_to_one() -> None:
    for std, mean, levels in itertools.product([0.3, 0.01, 0.001], [-1.4, -1.0, 0.1, 0.5, 1.0], [256, 2]):
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


def test_categorical_gathers_log_softmax() -> None:
    for pixels in [(), (3, 3)]:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(5, 7, *pixels, generator=generator, dtype=torch.float64)
        value = torch.randint(7, (5, *pixels), generator=generator)
        expected = logits.log_softmax(1).gather(1, value[:, None]).squeeze(1)
        torch.testing.assert_close(categorical_log_prob(logits, value), expected, rtol=1e-13, atol=0)
        by_torch = Categorical(logits=logits.movedim(1, -1)).log_prob(value)
        torch.testing.assert_close(expected, by_torch, rtol=1e-13, atol=0)


def test_reductions_keep_the_batch() -> None:
    for shape in [(3,), (3, 2), (3, 2, 4, 4)]:
        x: Tensor = torch.arange(3.0).reshape(3, *(1,) * (len(shape) - 1)).expand(shape)
        size = x[0].numel()
        assert sum_except_batch(x).tolist() == [0, size, 2 * size]
        assert mean_except_batch(x).tolist() == [0, 1, 2]


# --------------------------------------------------------------------------------------- von Mises–Fisher on the sphere

ORDERS = [0, 0.5, 1, 15.5, 29.5, 30, 255, 1000]


def directions(seed: int, rows: int, dimension: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, dimension, generator=generator, dtype=dtype), dim=1)


def test_log_bessel_and_its_gradient_are_those_of_mpmath() -> None:
    for order in ORDERS:
        x = torch.logspace(-3, 5, 17, dtype=torch.float64, requires_grad=True)
        value = log_bessel_i(order, x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        with mpmath.workdps(40):
            bessel = [(mpmath.mpf(a), mpmath.besseli(order, a), mpmath.besseli(order + 1, a)) for a in x.tolist()]
            log = torch.tensor([float(mpmath.log(i)) for _, i, _ in bessel], dtype=torch.float64)
            slope = torch.tensor([float(above / i + order / a) for a, i, above in bessel], dtype=torch.float64)
        torch.testing.assert_close(value.detach(), log, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-10)


def test_log_bessel_is_that_of_scipy() -> None:
    for order in ORDERS:
        x = torch.logspace(-3, 5, 161, dtype=torch.float64)
        scaled = torch.from_numpy(scipy.special.ive(order, x.numpy()))
        x, scaled = x[scaled > 1e-290], scaled[scaled > 1e-290]  # below that scipy underflows
        torch.testing.assert_close(log_bessel_i(order, x), scaled.log() + x, rtol=1e-9, atol=1e-9)


def test_log_bessel_can_be_differentiated_twice() -> None:
    for order in [0, 2.5, 40]:
        x = torch.tensor([0.1, 3.0, 50.0], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a: log_bessel_i(order, a), x)
        assert torch.autograd.gradgradcheck(lambda a: log_bessel_i(order, a), x)


def test_von_mises_fisher_integrates_to_one_on_circle_and_sphere() -> None:
    for kappa in [0.1, 1.0, 50.0]:
        angle = torch.linspace(-math.pi, math.pi, 2001, dtype=torch.float64)[
            1:
        ]  # periodic: the trapezoid rule is exact
        circle = torch.stack([angle.cos(), angle.sin()], dim=1)
        mean = directions(0, 1, 2).expand_as(circle)
        mass = vmf_log_prob(mean, torch.full((2000,), kappa).double(), circle).exp().sum() * 2 * math.pi / 2000
        assert float(mass) == pytest.approx(1, abs=1e-12)

        nodes, weights = np.polynomial.legendre.leggauss(200)  # the cosine is uniform on the sphere (Archimedes)
        cosine = torch.from_numpy(nodes)
        sphere = torch.stack([cosine, (1 - cosine**2).sqrt(), torch.zeros(200)], dim=1)
        pole = torch.eye(3, dtype=torch.float64)[:1].expand_as(sphere)
        density = vmf_log_prob(pole, torch.full((200,), kappa).double(), sphere).exp()
        assert float((density * torch.from_numpy(weights)).sum()) * 2 * math.pi == pytest.approx(1, abs=1e-12)


def test_von_mises_fisher_log_prob_is_that_of_scipy() -> None:
    for dimension, kappa in [(2, 5.0), (3, 0.5), (32, 200.0), (512, 700.0)]:
        mean, value = directions(0, 1, dimension), directions(1, 20, dimension)
        value = torch.nn.functional.normalize(value + mean, dim=1)
        ours = vmf_log_prob(mean.expand_as(value), torch.full((20,), kappa).double(), value)
        theirs = scipy.stats.vonmises_fisher(mean[0].numpy(), kappa).logpdf(value.numpy())
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-10, atol=1e-9)


def test_likeliest_concentration_gives_the_observed_mean_length() -> None:
    """d/dκ log p = μ·x − A_D(κ), so the gradient vanishes where the cosine equals the mean length."""
    for dimension in [2, 3, 512]:
        kappa = torch.tensor([0.1, 10.0, 3000.0], dtype=torch.float64, requires_grad=True)
        length = vmf_mean_length(dimension, kappa.detach())
        assert ((length > 0) & (length < 1)).all()
        mean = torch.eye(dimension, dtype=torch.float64)
        value = length[:, None] * mean[0] + (1 - length**2).sqrt()[:, None] * mean[1]
        (gradient,) = torch.autograd.grad(vmf_log_prob(mean[:1].expand_as(value), kappa, value).sum(), kappa)
        torch.testing.assert_close(gradient, torch.zeros(3).double(), rtol=0, atol=1e-11)


LAWS = [(2, 0.1), (2, 3.0), (2, 1e5), (3, 0.5), (4, 30.0), (32, 200.0), (512, 2000.0), (1024, 0.1), (1024, 1e5)]


def drawn(dimension: int, kappa: float, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, dimension + 1, generator=generator, dtype=torch.float64)
    mean = directions(1, 1, dimension).expand(rows, dimension)
    return mean, vmf_sample(mean, torch.full((rows,), kappa).double(), noise)


def test_cosines_of_samples_follow_their_law() -> None:
    """Kolmogorov's distance exceeds 2/√n with probability 2·exp(−8), the law by quadrature."""
    for dimension, kappa in LAWS:
        rows = 2000
        mean, value = drawn(dimension, kappa, rows)
        torch.testing.assert_close(value.norm(dim=1), torch.ones(rows).double(), rtol=0, atol=1e-11)
        cosine = (mean * value).sum(dim=1).clamp(-1, 1).sort().values
        # with w = 1 − 2 s the density of s is ∝ (s (1 − s))^{(D−3)/2} e^{−2κs}; s = sin²(θ/2) removes the poles
        theta = (
            torch.cat([torch.zeros(1), torch.logspace(-5, math.log10(math.pi), 200_000)]).double().clamp(max=math.pi)
        )
        log_density = (
            torch.xlogy(torch.tensor(dimension - 2.0), theta.sin().clamp(min=0)) - 2 * kappa * (theta / 2).sin() ** 2
        )
        survival = torch.cumulative_trapezoid((log_density - log_density.max()).exp(), theta)
        expected = 1 - np.interp(cosine.acos(), theta[1:], survival / survival[-1])
        ranks = (np.arange(rows) + 0.5) / rows
        assert np.abs(expected - ranks).max() < 2 / math.sqrt(rows)


def test_mean_of_samples_points_along_the_mean_with_length_a() -> None:
    for dimension, kappa in LAWS:
        mean, value = drawn(dimension, kappa, 2000)
        cosine = (mean * value).sum(dim=1)
        length = vmf_mean_length(dimension, torch.tensor(kappa).double())
        assert abs(float(cosine.mean() - length)) < 5 * float(cosine.std()) / math.sqrt(2000)
        tangent = value - cosine[:, None] * mean  # isotropic: each coordinate's mean is zero within its standard error
        assert (tangent.mean(dim=0).abs() < 5 * tangent.std(dim=0) / math.sqrt(2000)).all()


def test_samples_are_those_of_scipy() -> None:
    """Two-sample test on coordinates of the sample itself, whose law mixes angle and tangent."""
    mean, value = drawn(5, 4.0, 3000)
    theirs = scipy.stats.vonmises_fisher(mean[0].numpy(), 4.0).rvs(3000, random_state=0)
    for k in range(5):
        assert scipy.stats.ks_2samp(value[:, k].numpy(), theirs[:, k]).pvalue > 1e-4


def test_samples_do_not_depend_on_the_split() -> None:
    for dimension, size in itertools.product([2, 3, 512], [1, 3]):
        mean, kappa = directions(0, 8, dimension, torch.float32), torch.logspace(-1, 5, 8)
        noise = torch.randn(8, dimension + 1, generator=torch.Generator().manual_seed(0))
        whole = vmf_sample(mean, kappa, noise)
        assert whole.dtype == torch.float32
        parts = [vmf_sample(*part) for part in zip(mean.split(size), kappa.split(size), noise.split(size), strict=True)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-7)


def test_von_mises_fisher_in_float32_stays_finite_and_close_at_extreme_concentrations() -> None:
    kappa = torch.logspace(-2, 5, 15, requires_grad=True)
    mean = directions(0, 15, 512, torch.float32).requires_grad_()
    value = directions(1, 15, 512, torch.float32)
    log_prob, length = vmf_log_prob(mean, kappa, value), vmf_mean_length(512, kappa)
    assert log_prob.dtype == length.dtype == torch.float32
    wide = vmf_log_prob(mean.double(), kappa.double(), value.double()).float()
    torch.testing.assert_close(log_prob, wide, rtol=1e-6, atol=0)
    for gradient in torch.autograd.grad((log_prob + length).sum(), [mean, kappa]):
        assert gradient.isfinite().all()
    slope = (mean * value).sum(dim=1) - length  # d log p/dκ; A' ≤ 1/D adds less than 0.002
    (gradient,) = torch.autograd.grad(vmf_log_prob(mean, kappa, value).sum(), kappa)
    torch.testing.assert_close(gradient, slope.detach(), rtol=1e-5, atol=1e-6)


def test_samples_of_extreme_noise_are_finite() -> None:
    for number in [-40.0, 40.0]:
        noise = torch.full((3, 5), number) + torch.arange(5.0)
        value = vmf_sample(directions(0, 3, 4, torch.float32), torch.tensor([0.01, 1.0, 1e5]), noise)
        torch.testing.assert_close(value.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
