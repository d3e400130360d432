"""The four terms of the bound, L0 … L3, per sample: (B,), Eq. (7)–(10), and what training adds, Eq. (22)–(24).

`mmdiff.evaluation.elbo` sums their exact forms in nats. Training uses the reweighted `denoising_error` or
`uncertain_error` for L1 and L3, and each modality's `nll` for L2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mmdiff.likelihoods import Gaussian, discretised_gaussian_log_prob, mean_except_batch, sum_except_batch

WEIGHT_FACTOR = 100.0  # a learned weight stays within this factor of the fixed one
WEIGHT_SPEED = 10.0  # d log w / d parameter at the start


def terminal_kl(terminal: Gaussian) -> Tensor:
    """L0 = KL( q(z_T | z_0, X) ‖ N(0, I) ), Eq. (7), nats."""
    mean, variance = terminal
    per_dim = 0.5 * (mean.square() + variance - 1 - variance.log())  # as `Gaussian.kl`, without tensors of 0 and 1
    return sum_except_batch(per_dim.expand_as(mean))


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


def learned_weight(parameter: Tensor, start: float, factor: float = WEIGHT_FACTOR) -> tuple[Tensor, Tensor]:
    """(w, −½ log w) of one modality, Eq. (22): its loss L counts w L − ½ log w (Kendall et al., 2018, 1705.07115).

    For a fixed L the best w is 1 / (2 L). A likelihood of a continuous value has no lower bound, and where L < 0 there
    is no best w, so w keeps within a ``factor`` of where it starts. It stays able to turn back: the bound is smooth.
    Adam moves a parameter by about the learning rate per step, however large the gradient; ten times as much here.

    Args:
        parameter: trained, any shape of one number; 0 is w = ``start``.
        start: the fixed weight, > 0.
        factor: > 1.
    """
    bound = math.log(factor)
    log_weight = math.log(start) + bound * torch.tanh(WEIGHT_SPEED * parameter.float().squeeze() / bound)
    return log_weight.exp(), -0.5 * log_weight


def contrastive_error(prediction: Tensor, other_target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The negative of contrastive flow matching, Eq. (23): ‖prediction − another sample's target‖² per dimension: (B,).

    Stoica et al. (2025, arXiv 2506.05350) subtract λ times it from the error of flow matching.
    """
    return denoising_error(prediction, other_target, weight)


def misalignment(projected: Tensor, teacher: Tensor) -> Tensor:
    """Representation alignment, Eq. (24): minus the mean cosine over places, in [−1, 1] (Yu et al., 2025, 2410.06940).

    Args:
        projected: the backbone's features, projected, (B, K, h, w).
        teacher: the frozen encoder's, (B, K, h, w).
    """
    return -cosine_similarity(projected.float(), teacher.float(), dim=1).mean(dim=(1, 2))
