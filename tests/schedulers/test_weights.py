"""The laws of the weight schedules: Eq. (3), the peak, the ends, and the gradients of a learned schedule."""

from __future__ import annotations

import itertools

import pytest
import torch
from refusals import refused
from torch import Tensor

from mmdiff.schedulers import weights
from mmdiff.schedulers.mt_diffusion import BETA_SCHEDULES, MTDiffusionScheduler

SCALE = 1.7
LABEL = "label"


def scheduler(schedule: str, scale: float = SCALE, **options: object) -> MTDiffusionScheduler:
    entry = {"schedule": schedule, "scale": scale}
    return MTDiffusionScheduler(weights={LABEL: entry}, allow_nonzero_terminal=True, **options)


def random_parameters() -> Tensor:
    # increments of r from softplus(-4) ≈ 0.02 to softplus(4) ≈ 4: far from the linear r of the initial parameters
    generator = torch.Generator().manual_seed(0)
    return 8 * torch.rand(weights.LEARNED_NODES, generator=generator) - 4


def depth_ratio(sched: MTDiffusionScheduler) -> Tensor:
    """r_t up to a constant: W_t / (√ā_t √(1 − ā_T/ā_t)), without t = T, where it is 0/0."""
    a_bar = sched.alphas_cumprod
    return (sched.cumulative_weights(LABEL) / (a_bar * (1 - a_bar[-1] / a_bar)).sqrt())[:-1]


# ------------------------------------------------------------------------------------------------- every schedule


def test_step_weights_rebuild_cumulative_weights() -> None:
    for beta_schedule, schedule in itertools.product(BETA_SCHEDULES, weights.SCHEDULES):
        sched = scheduler(schedule, beta_schedule=beta_schedule)
        total, rebuilt = 0.0, []
        for a_t, w_t in zip(sched.alphas.tolist(), sched.step_weights(LABEL).tolist(), strict=True):
            total = a_t**0.5 * (total + w_t)
            rebuilt.append(total)
        # 1000 roundings (2e-16) of numbers of order 1, times ten
        expected = sched.cumulative_weights(LABEL)
        torch.testing.assert_close(torch.tensor(rebuilt, dtype=torch.float64), expected, rtol=0, atol=2e-12)


def test_peak_is_the_scale() -> None:
    for beta_schedule, scale, schedule in itertools.product(BETA_SCHEDULES, [0.02, SCALE, 7.0], weights.SCHEDULES):
        peak = scheduler(schedule, scale, beta_schedule=beta_schedule).cumulative_weights(LABEL).max()
        assert float(peak) == pytest.approx(0.0 if schedule == "none" else scale, rel=1e-14, abs=0)


def test_default_entry_is_constant_at_the_default_scale() -> None:
    default = MTDiffusionScheduler(weights={LABEL: {}}).cumulative_weights(LABEL)
    assert torch.equal(default, scheduler("constant", 1.5).cumulative_weights(LABEL))


# ------------------------------------------------------------------------------------------------ one by one


def test_constant_has_one_step_weight() -> None:
    for beta_schedule in BETA_SCHEDULES:
        w = scheduler("constant", beta_schedule=beta_schedule).step_weights(LABEL)
        assert w[0] > 0
        # w_t is the difference W_t/√a_t − W_{t−1} of numbers that reach scale/√a_T ≈ 54: 54 · 2e-16, times ten
        torch.testing.assert_close(w, w[:1].expand_as(w), rtol=0, atol=1e-13)


def test_early_is_the_ordinary_diffusion_of_the_shifted_anchor() -> None:
    for beta_schedule in BETA_SCHEDULES:
        sched = scheduler("early", beta_schedule=beta_schedule)
        z_0, encoding = torch.randn(2, 1, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        lam = SCALE / sched.alphas_cumprod[0].sqrt()  # the peak of λ √ā_t is at t = 1
        times = torch.arange(1000)
        weighted = sched.marginal(z_0, times, {LABEL: encoding})
        shifted = sched.marginal(z_0 + lam * encoding, times)
        torch.testing.assert_close(weighted.mean, shifted.mean, rtol=0, atol=1e-14)
        # all of E arrives in the first step and nothing afterwards
        torch.testing.assert_close(sched.step_weights(LABEL)[1:], torch.zeros(999).double(), rtol=0, atol=1e-12)


def test_bump_is_zero_at_both_ends() -> None:
    for beta_schedule in BETA_SCHEDULES:
        sched = scheduler("bump", beta_schedule=beta_schedule)
        cumulative, a_bar = sched.cumulative_weights(LABEL), sched.alphas_cumprod
        # the peak of √(ā(1−ā)) is ½ (at ā = ½, met by a grid of 1000 to 1e-4), so W_t = 2 · scale · √(ā(1−ā))
        torch.testing.assert_close(cumulative, 2 * SCALE * (a_bar * (1 - a_bar)).sqrt(), rtol=1e-4, atol=0)
        assert cumulative[0] < 2.001 * SCALE * (1 - a_bar[0]).sqrt() < 0.02 * 2 * SCALE
        assert cumulative[-1] < 2.001 * SCALE * a_bar[-1].sqrt() < 0.07 * 2 * SCALE


def test_none_is_zero() -> None:
    sched = scheduler("none")
    assert not sched.cumulative_weights(LABEL).any()
    assert not sched.step_weights(LABEL).any()


# ----------------------------------------------------------------------------------------------- the terminal weight


def test_terminal_weight_of_constant() -> None:
    for beta_schedule, terminal in [("squaredcos_cap_v2", 0.001), ("linear", 0.71), ("scaled_linear", 0.59)]:
        sched = scheduler("constant", 1.5, beta_schedule=beta_schedule)
        digits = 3 if terminal < 0.01 else 2
        assert round(float(sched.cumulative_weights(LABEL)[-1]), digits) == terminal


def test_terminal_weight_is_refused_by_name() -> None:
    for beta_schedule in ["linear", "scaled_linear"]:
        entry = {"schedule": "constant", "scale": 1.5}
        with refused("weights.depth", entry, "allow_nonzero_terminal"):
            MTDiffusionScheduler(beta_schedule=beta_schedule, weights={"depth": entry})


def test_terminal_weight_of_unit_steps_on_the_linear_schedule() -> None:
    # theory, section 3: "with w_t = 1 and the linear schedule c_T is 114 times the encoding"
    assert float(weights.constant(scheduler("none", beta_schedule="linear").path)[-1]) == pytest.approx(114, abs=0.5)


# ---------------------------------------------------------------------------------------------------------- learned


def test_learned_ratio_is_non_decreasing_and_vanishes_at_the_end() -> None:
    for beta_schedule, initial in itertools.product(BETA_SCHEDULES, [True, False]):
        sched = scheduler("learned", beta_schedule=beta_schedule)
        parameters = weights.initial_parameters() if initial else random_parameters()
        sched = sched.with_learned_weights({LABEL: (parameters, torch.tensor(0.0))})
        ratio = depth_ratio(sched)
        assert (ratio.diff() >= -1e-12 * ratio[-1]).all()
        assert ratio[0].abs() < 1e-12 * ratio[-1]  # r = 0 at t = 1, the start of the log-SNR grid
        assert sched.cumulative_weights(LABEL)[-1] == 0


def test_initial_ratio_is_linear_in_log_snr() -> None:
    sched = scheduler("learned")
    a_bar = sched.alphas_cumprod
    log_snr = (a_bar / (1 - a_bar)).log()
    linear = (log_snr[0] - log_snr) / (log_snr[0] - log_snr[-1])
    middle = slice(1, 900)  # the grid clamps ā at 1e-9; the cosine's ā_T = 2.4e-9 is above it
    ratio = depth_ratio(sched)[middle] / linear[middle]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=0)


def test_gradients_flow_to_the_learned_weights() -> None:
    for beta_schedule in BETA_SCHEDULES:
        sched = scheduler("learned", beta_schedule=beta_schedule)
        parameters = random_parameters().requires_grad_()
        log_scale = torch.tensor(0.3, requires_grad=True)
        sched = sched.with_learned_weights({LABEL: (parameters, log_scale)})
        z_0, noise, encoding = torch.randn(3, 1000, 1, 2, 2, generator=torch.Generator().manual_seed(2))
        sched.add_noise(z_0, noise, torch.arange(1000), {LABEL: encoding}).square().mean().backward()
        # the grid ends at t = T − 1, as W_T = 0 whatever the parameters are: every increment is reached
        assert parameters.grad is not None and bool((parameters.grad != 0).all())
        assert log_scale.grad is not None and float(log_scale.grad) != 0


def test_gradient_of_log_scale_is_the_aggregate() -> None:
    # W ∝ exp(log_scale), hence ∂ Σ z_t / ∂ log_scale = Σ c_t
    sched = scheduler("learned")
    log_scale = torch.tensor(-0.2, dtype=torch.float64, requires_grad=True)
    sched = sched.with_learned_weights({LABEL: (random_parameters(), log_scale)})
    encoding, times = torch.full((10, 1, 1, 1), 2.0, dtype=torch.float64), torch.arange(50, 1000, 100)
    zero = torch.zeros_like(encoding)
    z_t = sched.add_noise(zero, zero, times, {LABEL: encoding})
    (gradient,) = torch.autograd.grad(z_t.sum(), log_scale)
    assert float(gradient) == pytest.approx(float(z_t.detach().sum()), rel=1e-12)


def test_log_scale_multiplies_the_peak() -> None:
    sched = scheduler("learned")
    sched = sched.with_learned_weights({LABEL: (random_parameters(), torch.tensor(2.0).log())})
    assert float(sched.cumulative_weights(LABEL).max()) == pytest.approx(2 * SCALE, rel=1e-6)  # log 2 is float32


def test_replaced_weights_reach_every_table() -> None:
    """`add_noise` reads cached tables; a stale one would train on the weights of an earlier step."""
    sched = scheduler("learned")
    encoding, times = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.tensor([500])
    before = sched.aggregate({LABEL: encoding}, times, encoding)
    sched = sched.with_learned_weights({LABEL: (random_parameters(), torch.tensor(0.0))})
    after = sched.aggregate({LABEL: encoding}, times, encoding)
    assert float(after) == float(sched.cumulative_weights(LABEL)[500]) != float(before)


# ------------------------------------------------------------------------------------- zero-terminal SNR, literal α


def test_zero_terminal_snr_has_nothing_at_the_end() -> None:
    for schedule in weights.SCHEDULES:
        sched = MTDiffusionScheduler(rescale_betas_zero_snr=True, weights={LABEL: {"schedule": schedule}})
        z_0, z_t, encoding = torch.randn(3, 1, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        assert sched.alphas[-1] == sched.alphas_cumprod[-1] == 0
        assert sched.cumulative_weights(LABEL)[-1] == sched.step_weights(LABEL)[-1] == 0
        last, shown = torch.tensor([999]), {LABEL: encoding}
        for law in (sched.marginal(z_0, last, shown), sched.transition(z_0, last, shown)):
            assert not law.mean.any()
            assert (law.variance == 1).all()
        # z_T says nothing of z_{T−1}: the posterior is the marginal one step earlier
        posterior, before = sched.posterior(z_0, z_t, last, shown), sched.marginal(z_0, last - 1, shown)
        torch.testing.assert_close(posterior.mean, before.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(posterior.variance, before.variance, rtol=1e-14, atol=0)


def test_zero_terminal_snr_refuses_what_divides_by_it() -> None:
    for key, value in [("prediction_type", "epsilon"), ("solver", "DEISMultistepScheduler")]:
        with refused(key, value):
            MTDiffusionScheduler(rescale_betas_zero_snr=True, **{key: value})


def test_literal_alpha_warns_and_destroys_the_anchor() -> None:
    def steps_until_destroyed(sched: MTDiffusionScheduler) -> int:
        return int((sched.alphas_cumprod < 1e-3).nonzero()[0]) + 1

    with pytest.warns(UserWarning, match="literal_alpha") as caught:
        literal = scheduler("none", literal_alpha=True)  # N = 1
    assert [("after 10 of 1000 steps" in str(warning.message)) for warning in caught] == [True]
    assert steps_until_destroyed(literal) == 10  # 2^-10 = 0.98e-3
    for beta_schedule, steps in (("squaredcos_cap_v2", 980), ("linear", 826)):
        assert steps_until_destroyed(scheduler("none", beta_schedule=beta_schedule)) == steps


def test_numbers_that_were_looked_up_do_not_outlive_their_weights() -> None:
    sched = scheduler("learned")
    encodings = {LABEL: torch.ones(1, 1, 1, 1, dtype=torch.float64)}
    before = sched.aggregate(encodings, 40, encodings[LABEL])
    sched = sched.with_learned_weights({LABEL: (random_parameters(), torch.tensor(0.5).log())})
    after = sched.aggregate(encodings, 40, encodings[LABEL])
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, sched.aggregate(encodings, torch.tensor([40]), encodings[LABEL]))
