"""The terms of the bound against torch.distributions and closed forms, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from mmdiff import losses
from mmdiff.likelihoods import Gaussian
from mmdiff.schedulers import MTDiffusionScheduler, MTFlowMatchScheduler

SHAPE = (5, 2, 3, 3)


def randn(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(seed: int) -> Gaussian:
    return Gaussian(randn(seed), 0.1 + randn(seed + 100, (SHAPE[0], 1, 1, 1)).square())


def reference(law: Gaussian) -> Independent:
    return Independent(Normal(law.mean, law.variance.sqrt().expand_as(law.mean)), 3)


def scheduler(beta_schedule: str = "linear", prediction_type: str = "v_prediction") -> MTDiffusionScheduler:
    return MTDiffusionScheduler(
        num_train_timesteps=100,
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        weights={"label": {"schedule": "bump", "scale": 0.5}},
        allow_nonzero_terminal=True,
    )


def test_terminal_kl_is_that_of_torch() -> None:
    law = gaussian(0)
    standard = Gaussian(torch.zeros_like(law.mean), torch.ones_like(law.mean))
    torch.testing.assert_close(losses.terminal_kl(law), kl_divergence(reference(law), reference(standard)))
    assert losses.terminal_kl(standard).tolist() == [0.0] * SHAPE[0]


def test_transition_kl_is_that_of_torch() -> None:
    p, q = gaussian(0), gaussian(1)
    torch.testing.assert_close(losses.transition_kl(p, q), kl_divergence(reference(p), reference(q)))
    assert losses.transition_kl(p, p).tolist() == [0.0] * SHAPE[0]


def test_kl_of_two_posteriors_is_the_difference_of_snrs() -> None:
    """KL( q(z_s | z_t, z_0) ‖ q(z_s | z_t, x̂_0) ) = ½ (SNR(s) − SNR(t)) ‖z_0 − x̂_0‖² (Kingma et al., 2021, Eq. 13)."""
    for beta_schedule, aggregated in itertools.product(["linear", "squaredcos_cap_v2"], [False, True]):
        process, z_0, guess, z_t = scheduler(beta_schedule), randn(0), randn(1), randn(2)
        encodings = {"label": randn(3)} if aggregated else None
        snr = process.alphas_cumprod / (1 - process.alphas_cumprod)
        for t in (1, 2, 50, 98, 99):
            steps = torch.full((SHAPE[0],), t)
            kl = losses.transition_kl(
                process.posterior(z_0, z_t, steps, encodings), process.posterior(guess, z_t, steps, encodings)
            )
            expected = 0.5 * (snr[t - 1] - snr[t]) * (z_0 - guess).square().sum(dim=(1, 2, 3))
            # 1 − ā, at least 1e-4 here, is a difference of numbers near 1: 1e-12 of it is lost; SNRs differ by 10 %
            torch.testing.assert_close(kl, expected, rtol=1e-9, atol=0)


def test_density_of_the_anchor_is_that_of_torch() -> None:
    law, value = gaussian(0), randn(1)
    torch.testing.assert_close(losses.anchor_nll(law, value, levels=None), -reference(law).log_prob(value))


def test_masses_of_a_one_pixel_anchor_sum_to_one() -> None:
    for levels, std in itertools.product([2, 17, 256], [0.02, 0.5]):
        grid = torch.linspace(-1, 1, levels, dtype=torch.float64)[:, None, None, None]
        law = Gaussian(torch.full_like(grid, 0.3), torch.full_like(grid, std**2))
        masses = (-losses.anchor_nll(law, grid, levels)).exp()
        assert float(masses.sum()) == pytest.approx(1.0, abs=1e-12)


def test_masses_of_many_pixels_multiply() -> None:
    grid = torch.linspace(-1, 1, 256, dtype=torch.float64)
    value = grid[torch.randint(256, SHAPE, generator=torch.Generator().manual_seed(0))]
    law = gaussian(0)
    one_by_one = [
        losses.anchor_nll(Gaussian(m.view(1, 1), v.view(1, 1)), x.view(1, 1)).squeeze()
        for m, v, x in zip(law.mean.flatten(), law.variance.expand_as(law.mean).flatten(), value.flatten(), strict=True)
    ]
    expected = torch.stack(one_by_one).view(SHAPE).sum(dim=(1, 2, 3))
    torch.testing.assert_close(losses.anchor_nll(law, value), expected)


def test_fine_masses_are_densities_times_the_bin() -> None:
    """2/255 wide bins and a standard deviation of 0.5: the curvature within a bin is (bin/σ)²/24 ≈ 1e-5 of the mass,
    and 3 σ away 8 times as much."""
    grid = torch.linspace(-1, 1, 256, dtype=torch.float64)[1:-1, None, None, None]
    law = Gaussian(torch.full_like(grid, 0.1), torch.full_like(grid, 0.25))
    density = losses.anchor_nll(law, grid, levels=None) - math.log(2 / 255)
    torch.testing.assert_close(losses.anchor_nll(law, grid, 256), density, rtol=0, atol=1e-4)


def test_denoising_error_is_a_mean_per_sample() -> None:
    prediction, target, weight = randn(0), randn(1), randn(2, (SHAPE[0],)).square().float()
    rows = zip(prediction, target, strict=True)
    expected = torch.stack([torch.nn.functional.mse_loss(p, t) for p, t in rows]).float()
    torch.testing.assert_close(losses.denoising_error(prediction, target), expected)
    torch.testing.assert_close(losses.denoising_error(prediction, target, weight), expected * weight)


def test_the_uncertain_error_is_the_likelihood_of_a_gaussian() -> None:
    for size in [4, 32]:
        prediction, target = randn(0, (3, 1, size, size)), randn(1, (3, 1, size, size))
        log_std = torch.tensor([-4.9, -1.0, 1.9], dtype=torch.float64)
        law = torch.distributions.Normal(prediction, log_std.exp()[:, None, None, None])
        expected = -law.log_prob(target).mean(dim=(1, 2, 3)).float()
        error = losses.denoising_error(prediction, target)
        torch.testing.assert_close(losses.uncertain_error(error, log_std), expected, rtol=1e-5, atol=0)
        beyond = losses.uncertain_error(error, torch.tensor([-60.0, -5.0, 90.0]))
        assert torch.equal(
            beyond, losses.uncertain_error(error, torch.tensor([-5.0, -5.0, 2.0]))
        )  # never without bounds


def test_the_best_uncertainty_is_the_error_itself_and_rows_then_count_alike() -> None:
    """min over σ is at σ² = error; the gradient of ½ log(error) does not know the error's scale."""
    error = torch.tensor([1e-3, 0.04, 1.0], dtype=torch.float64, requires_grad=True)
    log_std = (0.5 * error.detach().log()).requires_grad_()
    loss = losses.uncertain_error(error, log_std)
    of_error, of_std = torch.autograd.grad(loss.sum(), (error, log_std))
    torch.testing.assert_close(of_std, torch.zeros_like(of_std), rtol=0, atol=1e-6)
    torch.testing.assert_close(of_error * error.detach(), torch.full_like(error, 0.5), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, 0.5 * error.log() + 0.5 * math.log(2 * math.pi * math.e), rtol=1e-6, atol=1e-6)


def test_recovery_counts_dimensions() -> None:
    assert losses.recovery_nll(torch.tensor([1.0, 2.0]), 64).tolist() == [64.0, 128.0]


def test_min_snr_of_the_flow_weighs_the_error_of_z_0() -> None:
    for gamma, prediction_type in itertools.product([0.01, 5.0, 1e9], ["velocity", "sample"]):
        process = MTFlowMatchScheduler(num_train_timesteps=100, prediction_type=prediction_type)
        steps = torch.tensor([0.5, 1.0, 31.4, 80.0, 99.9], dtype=torch.float64)
        z_0, noise, error = randn(0), randn(1), randn(2)
        target, z_t = process.training_target(z_0, noise, steps), process.add_noise(z_0, noise, steps)
        guess = process.predict_original_sample(target + error, steps, z_t)
        weight = losses.min_snr_weight(process.snr(steps), gamma, prediction_type)
        expected = (((100 - steps) / steps) ** 2).clamp(max=gamma) * (z_0 - guess).square().mean(dim=(1, 2, 3))
        weighted = losses.denoising_error(target + error, target, weight).double()
        torch.testing.assert_close(weighted, expected, rtol=1e-4, atol=0)  # the error is taken in float32


def test_min_snr_weighs_the_error_of_z_0_alike_for_every_prediction() -> None:
    """Whatever is predicted, the weighted error is min(SNR, γ) ‖z_0 − x̂_0‖² (Hang et al., 2023, Eq. 6)."""
    for gamma, prediction_type in itertools.product([0.01, 5.0, 1e9], ["sample", "epsilon", "v_prediction"]):
        process = scheduler(prediction_type=prediction_type)
        steps = torch.tensor([0, 10, 50, 80, 99])
        z_0, noise, error = randn(0), randn(1), randn(2)
        target = process.training_target(z_0, noise, steps)
        z_t = process.add_noise(z_0, noise, steps)
        guess = process.predict_original_sample(target + error, steps, z_t)
        alphas_cumprod = process.alphas_cumprod[steps]
        weight = losses.min_snr_weight(alphas_cumprod / (1 - alphas_cumprod), gamma, prediction_type)
        capped = (alphas_cumprod / (1 - alphas_cumprod)).clamp(max=gamma)
        expected = capped * (z_0 - guess).square().mean(dim=(1, 2, 3))
        # diffusers' own float32 ā_t enters z_t; it is 6e-8 off, and so is 1 − ā_1 = 1e-4 by 6e-4
        weighted = losses.denoising_error(target + error, target, weight).double()
        torch.testing.assert_close(weighted, expected, rtol=2e-3, atol=0)


def test_min_snr_identities() -> None:
    alphas_cumprod = torch.tensor([0.999, 0.5, 1e-4], dtype=torch.float64)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    capped = torch.tensor([5.0, 1.0, 1e-4 / (1 - 1e-4)], dtype=torch.float64)  # SNR = 999, 1, 1e-4
    weight = {kind: losses.min_snr_weight(snr, 5.0, kind) for kind in ("sample", "epsilon", "v_prediction")}
    torch.testing.assert_close(weight["sample"], capped)
    torch.testing.assert_close(weight["epsilon"] * snr, capped)
    torch.testing.assert_close(weight["v_prediction"] * (snr + 1), capped)
