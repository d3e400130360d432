"""The equations of the forward process against simulation and Bayes' rule, and the scheduler as a component."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from refusals import refused
from torch import Tensor

from mmdiff.schedulers.mt_diffusion import BETA_SCHEDULES, PREDICTION_TYPES, SOLVERS, MTDiffusionScheduler
from mmdiff.schedulers.weights import LEARNED_NODES

WEIGHTS = {"label": {"schedule": "constant", "scale": 1.5}, "mask": {"schedule": "bump", "scale": 0.7}}
SHAPE = (1, 2, 2, 2)
EVERY_BETAS: list[dict[str, Any]] = [
    *({"beta_schedule": name} for name in BETA_SCHEDULES),
    {"num_train_timesteps": 50},
    {"num_train_timesteps": 3, "trained_betas": [0.3, 0.05, 0.9]},
]


def scheduler(**options: Any) -> MTDiffusionScheduler:
    return MTDiffusionScheduler(**{"weights": WEIGHTS, "allow_nonzero_terminal": True, "clip_sample": False} | options)


def normal(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def encodings(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"label": normal(1, shape, dtype), "mask": normal(2, shape, dtype)}


def sample(sched: MTDiffusionScheduler, steps: int, z: Tensor, shown: dict[str, Tensor] | None = None) -> Tensor:
    sched.set_timesteps(steps)
    for t in sched.timesteps:
        z = sched.step(torch.tanh(z), t, z, shown, generator=torch.Generator().manual_seed(int(t))).prev_sample
    return z


# ------------------------------------------------------------------------------------------------- Eq. (1) and (2)


def test_marginal_is_the_iterated_transition() -> None:
    for betas in EVERY_BETAS:
        sched, z_0, shown = scheduler(**betas), normal(0), encodings()
        times = torch.arange(len(sched))
        offset = sched.transition(torch.zeros(SHAPE).double(), times, shown)  # z -> root · z + offset
        root = sched.transition(torch.ones(SHAPE).double(), times, shown).mean - offset.mean
        marginal = sched.marginal(z_0, times, shown)
        mean, variance = z_0[0], torch.zeros((), dtype=torch.float64)
        for t in times:
            mean = root[t] * mean + offset.mean[t]
            variance = root[t] ** 2 * variance + offset.variance[t]
            # T ≤ 1000 roundings of numbers below 10 in float64
            torch.testing.assert_close(marginal.mean[t], mean, rtol=0, atol=1e-12)
            torch.testing.assert_close(marginal.variance[t].expand_as(variance), variance, rtol=0, atol=1e-12)


def test_marginal_is_the_law_of_a_simulated_chain() -> None:
    sched, n = scheduler(num_train_timesteps=50), 20_000
    shown, generator = encodings((1, 1, 1, 1)), torch.Generator().manual_seed(3)
    z_0 = torch.full((n, 1, 1, 1), 0.8, dtype=torch.float64)
    z = z_0
    for t in torch.arange(50)[:, None]:
        z = sched.transition(z, t, shown).sample(torch.randn(z.shape, generator=generator, dtype=torch.float64))
        law = sched.marginal(z_0, t, shown)
        variance = float(law.variance)
        assert abs(float(z.mean() - law.mean[0])) < 5 * math.sqrt(variance / n)
        assert abs(float(z.var()) - variance) < 5 * variance * math.sqrt(2 / n)


# ---------------------------------------------------------------------------------------------- Eq. (4), (5) and (6)


def test_posterior_is_bayes_rule() -> None:
    for betas in EVERY_BETAS:
        sched, z_0, z_t, shown = scheduler(**betas), normal(0), normal(4), encodings()
        times = torch.arange(1, len(sched))  # t = 2 … T
        prior = sched.marginal(z_0, times - 1, shown)
        likelihood = sched.transition(torch.zeros(SHAPE).double(), times, shown)
        root = sched.transition(torch.ones(SHAPE).double(), times, shown).mean - likelihood.mean
        precision = 1 / prior.variance + root**2 / likelihood.variance
        mean = (prior.mean / prior.variance + root * (z_t - likelihood.mean) / likelihood.variance) / precision
        got = sched.posterior(z_0, z_t, times, shown)
        # 1 − ā_1 ≥ 4e-5 comes from 1 − (number near 1) with an error of 1e-16: 3e-12 relative, and the same for 1 − a_t
        torch.testing.assert_close(got.mean, mean, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(got.variance.expand_as(precision), 1 / precision, rtol=1e-9, atol=0)


def test_posterior_from_noise_is_the_same() -> None:
    for betas in EVERY_BETAS:
        sched, z_0, z_t, shown = scheduler(**betas), normal(0), normal(4), encodings()
        times = torch.arange(len(sched))
        marginal = sched.marginal(z_0, times, shown)
        noise = (z_t - marginal.mean) / marginal.variance.sqrt()
        from_noise, got = sched.posterior_from_noise(noise, z_t, times, shown), sched.posterior(z_0, z_t, times, shown)
        torch.testing.assert_close(from_noise.mean, got.mean, rtol=1e-9, atol=1e-10)
        assert torch.equal(from_noise.variance, got.variance)


def test_posterior_of_the_first_step_is_the_point_z_0() -> None:
    z_0 = normal(0)
    got = scheduler().posterior(z_0, normal(4), torch.tensor([0]), encodings())
    torch.testing.assert_close(got.mean, z_0, rtol=1e-14, atol=0)
    assert not got.variance.any()


# ----------------------------------------------------------------------------------------- diffusers' training half


def test_noising_and_velocity_are_those_of_diffusers() -> None:
    for dtype, beta_schedule, solver in itertools.product(
        [torch.float32, torch.float64], BETA_SCHEDULES, ["DDPMScheduler", "DDIMScheduler"]
    ):
        theirs = getattr(diffusers, solver)(beta_schedule=beta_schedule)
        z_0, noise, times = normal(0, (9, 2, 2, 2), dtype), normal(5, (9, 2, 2, 2), dtype), torch.arange(0, 1000, 124)
        ours = scheduler(solver=solver, beta_schedule=beta_schedule)
        noised = theirs.add_noise(z_0, noise, times)
        assert torch.equal(ours.add_noise(z_0, noise, times), noised)
        assert torch.equal(ours.add_noise(z_0, noise, times, {"label": torch.zeros_like(z_0)}), noised)
        assert torch.equal(ours.training_target(z_0, noise, times), theirs.get_velocity(z_0, noise, times))
        for prediction_type, target in (("epsilon", noise), ("sample", z_0)):
            assert torch.equal(scheduler(prediction_type=prediction_type).training_target(z_0, noise, times), target)


def test_noising_is_the_marginal_and_the_target_leads_back() -> None:
    for prediction_type in PREDICTION_TYPES:
        sched, times = scheduler(prediction_type=prediction_type), torch.arange(0, 990, 10)
        shape = (len(times), 2, 2, 2)
        z_0, noise, shown = normal(0, shape), normal(5, shape), encodings(shape)
        z_t, target = sched.add_noise(z_0, noise, times, shown), sched.training_target(z_0, noise, times)
        # diffusers' ā_t is a float32 product of up to 1000 factors: 1000 · 6e-8 relative at worst, halved by the root
        torch.testing.assert_close(z_t, sched.marginal(z_0, times, shown).sample(noise), rtol=0, atol=1e-4)
        recovered = sched.predict_original_sample(target, times, z_t, shown)
        scale = sched.alphas_cumprod[times].sqrt().reshape(-1, 1, 1, 1) if prediction_type == "epsilon" else 1.0
        torch.testing.assert_close(recovered * scale, z_0 * scale, rtol=0, atol=2e-4)


# ------------------------------------------------------------------------------------------------- timestep tensors


def test_mixed_timesteps_equal_one_by_one() -> None:
    for method in ["transition", "marginal", "posterior", "add_noise", "aggregate"]:
        sched, times = scheduler(), torch.tensor([999, 0, 500, 0, 37])
        rows, shown = normal(0, (5, 2, 2, 2)), encodings((5, 2, 2, 2))

        def call(i: slice) -> Tensor:
            part = {name: encoding[i] for name, encoding in shown.items()}
            arguments = {"posterior": (rows[i], rows[i] + 1, times[i]), "add_noise": (rows[i], rows[i] + 1, times[i])}
            if method == "aggregate":
                return sched.aggregate(part, times[i], rows[i])
            result = getattr(sched, method)(*arguments.get(method, (rows[i], times[i])), part)
            return (
                result
                if isinstance(result, Tensor)
                else torch.cat([result.mean, result.variance.expand_as(rows[i])], 1)
            )

        assert torch.equal(call(slice(None)), torch.cat([call(slice(i, i + 1)) for i in range(5)]))


def test_fractional_timesteps_interpolate_linearly() -> None:
    for timestep in [-1.0, -0.25, 0.0, 10.5, 998.75, 999.0]:
        sched, one = scheduler(), torch.ones(1, 1, 1, 1, dtype=torch.float64)
        table = [0.0, *sched.cumulative_weights("label").tolist()]  # W_0 = 0 is timestep −1
        left = min(math.floor(timestep) + 1, 999)
        expected = table[left] + (timestep + 1 - left) * (table[left + 1] - table[left])
        got = sched.aggregate({"label": one}, torch.tensor([timestep], dtype=torch.float64), one)
        assert float(got) == pytest.approx(expected, rel=1e-13, abs=0)


# ---------------------------------------------------------------------------------------------------- configuration

LEARNED = {
    "schedule": "learned",
    "scale": 1.2,
    "parameters": [0.1 * k - 1 for k in range(LEARNED_NODES)],
    "log_scale": 0.25,
}
CONFIGS: list[dict[str, Any]] = [
    {},
    {"num_train_timesteps": 20, "trained_betas": [0.01 * k for k in range(1, 21)], "beta_schedule": "linear"},
    {"weights": {"mask": LEARNED, "label": {"schedule": "early", "scale": 0.5}}, "timestep_spacing": "linspace"},
    {"solver": "DPMSolverMultistepScheduler", "solver_config": {"algorithm_type": "sde-dpmsolver++"}},
    {"solver": "DDIMScheduler", "solver_config": {"eta": 0.5}, "prediction_type": "sample", "clip_sample_range": 2.0},
]


def test_saved_scheduler_comes_back_bit_for_bit(tmp_path: Path) -> None:
    for config in CONFIGS:
        sched = scheduler(**config)
        sched.save_pretrained(tmp_path)
        loaded = MTDiffusionScheduler.from_pretrained(tmp_path)
        assert json.loads(loaded.to_json_string()) == json.loads(sched.to_json_string())
        for name in WEIGHTS:
            assert torch.equal(loaded.cumulative_weights(name), sched.cumulative_weights(name))
        start, shown = normal(0, dtype=torch.float32), encodings(dtype=torch.float32)
        assert torch.equal(sample(loaded, 7, start, shown), sample(sched, 7, start, shown))


def test_order_of_dicts_is_irrelevant() -> None:
    start, shown = normal(0, dtype=torch.float32), encodings(dtype=torch.float32)
    backwards = {name: shown[name] for name in reversed(shown)}
    reordered = scheduler(weights={name: WEIGHTS[name] for name in reversed(WEIGHTS)})
    assert torch.equal(sample(reordered, 5, start, backwards), sample(scheduler(), 5, start, shown))


def test_arguments_may_be_changed_afterwards(tmp_path: Path) -> None:
    def arguments() -> dict[str, Any]:
        return {
            "num_train_timesteps": 3,
            "trained_betas": [0.1, 0.5, 0.9],
            "weights": {"label": dict(LEARNED)},
            "solver": "DDIMScheduler",
            "solver_config": {"eta": 0.5},
        }

    ours, untouched = arguments(), scheduler(**arguments())
    sched = scheduler(**ours)
    ours["weights"]["label"]["scale"] = 9.0
    ours["weights"]["mask"] = {}
    ours["solver_config"]["eta"] = 0.0
    ours["trained_betas"][0] = 0.7
    assert json.loads(sched.to_json_string()) == json.loads(untouched.to_json_string())
    sched.save_pretrained(tmp_path)
    loaded, start = MTDiffusionScheduler.from_pretrained(tmp_path), normal(0)
    assert torch.equal(sample(loaded, 3, start), sample(untouched, 3, start))


# --------------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("solver", SOLVERS)
def test_clipping_bounds_the_prediction_and_leaves_the_rest(solver: str) -> None:
    for prediction_type, betas in [("v_prediction", {}), ("epsilon", {"beta_schedule": "linear"})]:

        def run(bound: float | None) -> tuple[Tensor, float]:
            sched = scheduler(
                solver=solver, clip_sample=bound is not None, clip_sample_range=bound or 1.0,
                prediction_type=prediction_type, **betas,
            )  # fmt: skip
            sched.set_timesteps(10)
            z, largest = normal(0), 0.0
            for t in sched.timesteps:
                out = sched.step(torch.tanh(z), t, z, encodings(), generator=torch.Generator().manual_seed(int(t)))
                z, largest = out.prev_sample, max(largest, float(out.pred_original_sample.abs().max()))
            return z, largest

        free, largest = run(None)
        clipped, bounded = run(largest / 2)
        assert bounded == largest / 2
        assert not torch.allclose(clipped, free, atol=1e-3)
        # a bound that nothing meets costs only the way to z_0 and back, in float32 for the multistep solvers
        assert run(largest * 2)[0].sub(free).abs().max() < 1e-5 * largest


def test_clipping_is_that_of_diffusers() -> None:
    for solver, extra in [("DDPMScheduler", {}), ("DDIMScheduler", {"use_clipped_model_output": True})]:
        common = {
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "beta_schedule": "squaredcos_cap_v2",
        }
        theirs = getattr(diffusers, solver)(clip_sample=True, clip_sample_range=0.5, **common)
        ours, z = scheduler(solver=solver, clip_sample=True, clip_sample_range=0.5), normal(0)
        for sched in (ours, theirs):
            sched.set_timesteps(20)
        for t in theirs.timesteps:
            seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
            expected = theirs.step(torch.tanh(z), t, z, generator=seeds[0], **extra)
            got = ours.step(torch.tanh(z), t, z, generator=seeds[1])
            # float32 tables against float64 ones: ā_t differs by up to 1e-6, σ by 1e-4 where it is small
            torch.testing.assert_close(got.prev_sample, expected.prev_sample, rtol=0, atol=1e-4)
            torch.testing.assert_close(got.pred_original_sample, expected.pred_original_sample, rtol=0, atol=1e-4)
            z = expected.prev_sample


# --------------------------------------------------------------------------------------------------------- refusals

KARRAS = {"use_karras_sigmas": True}
REFUSED_SOLVERS = (
    "EulerDiscreteScheduler HeunDiscreteScheduler LMSDiscreteScheduler KDPM2DiscreteScheduler PNDMScheduler "
    "FlowMatchEulerDiscreteScheduler NoSuchScheduler"
)


def test_other_solvers_are_refused_by_name() -> None:
    for solver in REFUSED_SOLVERS.split():
        with refused("solver", solver, *SOLVERS):
            scheduler(solver=solver)


REFUSED = [
    ("solver_config.use_karras_sigmas", {"solver": "DEISMultistepScheduler", "solver_config": KARRAS}),
    ("solver_config.eta", {"solver_config": {"eta": 1.0}}),
    ("weights.label.schedule", {"weights": {"label": {"schedule": "cosine"}}}),
    ("weights.label.peak", {"weights": {"label": {"peak": 1.0}}}),
    ("weights.label.scale", {"weights": {"label": {"scale": -1.0}}}),
    ("weights.label.scale", {"weights": {"label": {"scale": math.nan}}}),
    ("beta_schedule", {"beta_schedule": "cosine"}),
    ("prediction_type", {"prediction_type": "noise"}),
    ("timestep_spacing", {"timestep_spacing": "even"}),
    ("trained_betas", {"trained_betas": [0.1]}),
]


def test_bad_arguments_are_refused_by_name() -> None:
    for key, arguments in REFUSED:
        with refused(key):
            scheduler(**arguments)


def test_impossible_step_counts_are_refused() -> None:
    for steps in [0, 1001]:
        with refused("num_inference_steps", steps):
            scheduler().set_timesteps(steps)


def test_steps_out_of_order_are_refused() -> None:
    sched, z = scheduler(), normal(0)
    with refused("timestep", 999):
        sched.step(z, 999, z)
    sched.set_timesteps(2)
    for wrong in (499, torch.tensor(998)):
        with refused("timestep"):
            sched.step(z, wrong, z)
    for t in sched.timesteps:
        sched.step(z, t, z)
    with refused("timestep", 0):
        sched.step(z, 0, z)


def test_encodings_without_weights_are_refused() -> None:
    sched, z = scheduler(), normal(0)
    sched.set_timesteps(2)
    with refused("encodings", "depth"):
        sched.add_noise(z, z, torch.tensor([5]), {"depth": z})
    with refused("encodings", "depth"):
        sched.step(z, 999, z, {"depth": z})
    assert sched.step(z, 999, z).prev_sample.isfinite().all()  # the refusal did not count as a step
