"""The width of power-function averages, and any width from snapshots of a few (Karras et al., 2024, arXiv 2312.02696).

An average with exponent γ weighs the parameters of time τ by τ^γ: at time t by p(τ) = (γ + 1) τ^γ / t^(γ + 1), for
τ ≤ t. Its standard deviation, as a share of t, is its relative width σ_rel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WIDEST = 12**-0.5  # σ_rel of the plain mean, γ = 0


def relative_width(gamma: float) -> float:
    """σ_rel of an exponent γ ≥ 0."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def exponent(sigma_rel: float) -> float:
    """γ of a relative width in (0, `WIDEST`]: the largest root of (γ + 2)² (γ + 3) σ² = γ + 1."""
    inverse = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def product(one: Sequence[float], other: Sequence[float]) -> np.ndarray:
    """∫ p_a(τ) p_b(τ) dτ of averages a and b, each (time, γ); array-valued times and exponents broadcast.

    With t_a ≤ t_b it is (γ_a + 1) (γ_b + 1) (t_a / t_b)^γ_b / ((γ_a + γ_b + 1) t_b).
    """
    (t_a, g_a), (t_b, g_b) = (tuple(map(np.asarray, pair)) for pair in (one, other))
    early, late = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    gamma = np.where(t_a <= t_b, g_b, g_a)  # of the later one
    return (g_a + 1) * (g_b + 1) * (early / late) ** gamma / ((g_a + g_b + 1) * late)


def coefficients(
    times: Sequence[float], gammas: Sequence[float], time: float, gamma: float
) -> tuple[np.ndarray, float]:
    """How snapshots add up to another average, by least squares over the profiles p.

    Args:
        times, gammas: of the snapshots, (n,) each; times in steps.
        time, gamma: of the average that is wanted.

    Returns:
        ``(x, error)``: (n,) factors, and the part of the wanted profile that they miss, ‖p − Σ x p_i‖ / ‖p‖.
    """
    t, g = np.asarray(times, dtype=np.float64), np.asarray(gammas, dtype=np.float64)
    gram = product((t[:, None], g[:, None]), (t, g))  # (n, n)
    wanted, norm = product((t, g), (time, gamma)), product((time, gamma), (time, gamma))
    scale = np.diag(gram) ** -0.5
    solved = np.linalg.lstsq(gram * scale[:, None] * scale, wanted * scale, rcond=1e-13)[0] * scale
    missed = norm - 2 * solved @ wanted + solved @ gram @ solved
    return solved, float(np.sqrt(max(0.0, missed) / norm))
