"""The four terms of the bound, L0 … L3, per sample: (B,), Eq. (7)–(10).

`mmdiff.evaluation.elbo` sums their exact forms in nats. Training uses the reweighted `denoising_error` or
`uncertain_error` for L1 and L3, and each modality's `nll` for L2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmdiff.likelihoods import Gaussian, discretised_gaussian_log_prob, mean_except_batch, sum_except_batch


def terminal_kl(terminal: Gaussian) -> Tensor:
    """L0 = KL( q(z_T | z_0, X) ‖ N(0, I) ), Eq. (7), nats."""
    standard = Gaussian(torch.zeros_like(terminal.mean), torch.ones_like(terminal.variance))
    return terminal.kl(standard)


def transition_kl(posterior: Gaussian, predicted: Gaussian) -> Tensor:
    """One summand of L1, KL( q(z_{t−1} | z_t, z_0, X) ‖ p_θ(z_{t−1} | z_t, X) ), Eq. (8), nats."""
    return posterior.kl(predicted)


def recovery_nll(nll: Tensor, dimensions: int) -> Tensor:
    """One summand of L2, −log p_θ(x_i | z_t), Eq. (9), nats, from a modality's `nll` per dimension."""
    return nll * dimensions


def anchor_nll(predicted: Gaussian, original_samples: Tensor, levels: int | None = 256) -> Tensor:
    """L3 = −log p_θ(x_0 | z_1, X), Eq. (10), nats: for values on a grid of ``levels`` in [−1, 1], else a density."""
    if levels is None:
        return -predicted.log_prob(original_samples)
    variance = predicted.variance.expand_as(predicted.mean)
    return -sum_except_batch(discretised_gaussian_log_prob(predicted.mean, variance, original_samples, levels))


def denoising_error(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The reweighted L1 and L3: ‖target − prediction‖² per dimension, times an optional weight (B,)."""
    error = mean_except_batch((prediction.float() - target.float()) ** 2)
    return error if weight is None else error * weight


def uncertain_error(error: Tensor, log_std: Tensor) -> Tensor:
    """−log N(target; prediction, σ² I) per dimension, nats, from ‖target − prediction‖² per dimension: (B,).

    ``log_std`` (B,) is predicted from the network's inputs alone, so that the best prediction stays the conditional
    mean. At the best σ the loss of a row is ½ log of its error, up to a constant (Kendall et al., 2018; with σ of the
    noise level alone Karras et al., 2024).
    """
    log_std = log_std.float().clamp(-5.0, 2.0)
    return 0.5 * error * torch.exp(-2 * log_std) + log_std + 0.5 * math.log(2 * math.pi)


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """min(SNR, γ) divided by the SNR weight that the prediction type implies (Hang et al., 2023): (B,)."""
    capped = snr.clamp(max=gamma)
    return {
        "sample": capped,
        "epsilon": capped / snr.clamp(min=1e-12),
        "v_prediction": capped / (snr + 1),
        "velocity": capped / (snr.sqrt() + 1) ** 2,  # z_0 = u − σ v with 1/σ = 1 + √SNR
    }[prediction_type]
