"""Flow matching: the path against simulation, Bayes and diffusers; solvers under the shift; the law of the times."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from mixture import MODES, Joint, Mixture, S, assert_is_the_joint_law, fed
from refusals import refused
from scipy.stats import norm
from torch import Tensor

from mmdiff.schedulers import FLOW_SOLVERS, SOLVERS, MTDiffusionScheduler, MTFlowMatchScheduler, resolution_shift
from mmdiff.schedulers.weights import SCHEDULES

Options = dict[str, Any]
EULER, DPM, UNIPC = "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
SDE = {"algorithm_type": "sde-dpmsolver++"}
DETERMINISTIC: list[tuple[str, Options]] = [(EULER, {}), (DPM, {}), (UNIPC, {})]
CASES = [*DETERMINISTIC, (DPM, SDE)]
SHIFTED: list[tuple[str, Options]] = [(EULER, {"shift": 3.0}), (DPM, {"flow_shift": 2.0}), (UNIPC, {"flow_shift": 2.0})]
WEIGHTS = {"label": {"schedule": "constant", "scale": 1.5}, "mask": {"schedule": "bump", "scale": 0.7}}
SHAPE = (2, 3, 4, 4)


def scheduler(**options: Any) -> MTFlowMatchScheduler:
    return MTFlowMatchScheduler(**{"weights": WEIGHTS, "clip_sample": False} | options)


def normal(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def encodings(shape: tuple[int, ...] = SHAPE) -> dict[str, Tensor]:
    return {"label": normal(1, shape), "mask": normal(2, shape)}


# --------------------------------------------------------------------------------------------------------- the path


def test_marginal_is_the_composed_transition() -> None:
    for steps in [3, 50, 1000]:
        sched, z_0, shown = scheduler(num_train_timesteps=steps), normal(0, (1, 2, 2, 2)), encodings((1, 2, 2, 2))
        times = torch.arange(1, steps + 1)
        offset = sched.transition(torch.zeros_like(z_0), times, shown)
        ratio = sched.transition(torch.ones_like(z_0), times, shown).mean - offset.mean
        marginal = sched.marginal(z_0, times, shown)
        mean, variance = z_0[0], torch.zeros((), dtype=torch.float64)
        for k in range(steps):
            mean = ratio[k] * mean + offset.mean[k]
            variance = ratio[k] ** 2 * variance + offset.variance[k]
            torch.testing.assert_close(marginal.mean[k], mean, rtol=0, atol=1e-12)
            torch.testing.assert_close(marginal.variance[k].expand_as(variance), variance, rtol=0, atol=1e-12)
        torch.testing.assert_close(marginal.variance[:, 0, 0, 0], (times.double() / steps) ** 2, rtol=1e-14, atol=0)
        assert not mean.any() and float(marginal.variance[-1]) == 1.0  # N(0, I), whatever z_0 and the encodings


def test_posterior_is_bayes_rule() -> None:
    sched, z_0, z_t, shown = scheduler(), normal(0, (1, 2, 2, 2)), normal(4, (1, 2, 2, 2)), encodings((1, 2, 2, 2))
    times = torch.arange(2, 1001)
    prior, likelihood = sched.marginal(z_0, times - 1, shown), sched.transition(torch.zeros_like(z_0), times, shown)
    ratio = sched.transition(torch.ones_like(z_0), times, shown).mean - likelihood.mean
    precision = 1 / prior.variance + ratio**2 / likelihood.variance
    mean = (prior.mean / prior.variance + ratio * (z_t - likelihood.mean) / likelihood.variance) / precision
    got = sched.posterior(z_0, z_t, times, shown)
    torch.testing.assert_close(got.mean, mean, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got.variance.expand_as(precision), 1 / precision, rtol=1e-11, atol=0)
    first = sched.posterior(z_0, z_t, torch.tensor([1]), shown)
    torch.testing.assert_close(first.mean, z_0, rtol=1e-14, atol=0)
    assert not first.variance.any()
    marginal = sched.marginal(z_0, times[:-1], shown)  # ρ_T = 0
    noise = (z_t - marginal.mean) / marginal.variance.sqrt()
    from_noise = sched.posterior_from_noise(noise, z_t, times[:-1], shown)
    torch.testing.assert_close(from_noise.mean, got.mean[:-1], rtol=1e-9, atol=1e-9)


def test_without_its_shift_it_is_the_flow_of_diffusers() -> None:
    sched, theirs = scheduler(), diffusers.FlowMatchEulerDiscreteScheduler()
    times = theirs.timesteps[::37]
    z_0, noise = normal(0, (len(times), 2, 2, 2)), normal(5, (len(times), 2, 2, 2))
    shown = encodings(z_0.shape)
    u_t = sched.add_noise(z_0, noise, times, shown) - sched.aggregate(shown, times, z_0)
    # float32 σ against float64
    torch.testing.assert_close(u_t, theirs.scale_noise(z_0, times, noise), rtol=0, atol=1e-6)
    assert torch.equal(sched.training_target(z_0, noise, times), noise - z_0)


def test_noising_is_the_marginal_at_any_time_and_the_target_leads_back() -> None:
    for prediction_type in ["velocity", "sample"]:
        sched, times = scheduler(prediction_type=prediction_type), torch.tensor([1e-3, 0.4, 1.0, 500.25, 999.9, 1000.0])
        z_0, noise, shown = normal(0, (6, 2, 2, 2)), normal(5, (6, 2, 2, 2)), encodings((6, 2, 2, 2))
        sigma = times.double().reshape(-1, 1, 1, 1) / 1000
        c_t = torch.zeros_like(z_0)
        for name, encoding in shown.items():
            table = [0.0, *sched.cumulative_weights(name).tolist()]  # W linear between σ = k/T
            c_t += torch.from_numpy(np.interp(times.double(), np.arange(1001), table)).reshape(-1, 1, 1, 1) * encoding
        z_t = sched.add_noise(z_0, noise, times, shown)
        torch.testing.assert_close(z_t, (1 - sigma) * z_0 + c_t + sigma * noise, rtol=0, atol=1e-12)
        torch.testing.assert_close(sched.marginal(z_0, times, shown).sample(noise), z_t, rtol=0, atol=1e-12)
        target = sched.training_target(z_0, noise, times)
        torch.testing.assert_close(sched.predict_original_sample(target, times, z_t, shown), z_0, rtol=0, atol=1e-12)


def test_every_schedule_obeys_the_recursion_peaks_at_its_scale_and_vanishes() -> None:
    for schedule in SCHEDULES:
        sched = scheduler(weights={"label": {"schedule": schedule, "scale": 1.7}})
        cumulative, w = sched.cumulative_weights("label"), sched.step_weights("label")
        total, rebuilt = 0.0, []
        for k in range(1, 1001):  # ρ = (T − k)/(T − k + 1)
            total = (1000 - k) / (1001 - k) * (total + float(w[k - 1]))
            rebuilt.append(total)
        torch.testing.assert_close(torch.tensor(rebuilt, dtype=torch.float64), cumulative, rtol=0, atol=1e-12)
        assert float(cumulative.max()) == pytest.approx(0.0 if schedule == "none" else 1.7)
        assert cumulative[-1] == 0


def test_the_schedules_in_closed_form() -> None:
    sigma = torch.arange(1, 1000, dtype=torch.float64) / 1000
    shapes = {"constant": -(1 - sigma) * (1 - sigma).log(), "bump": sigma * (1 - sigma), "early": 1 - sigma}
    for name, shape in shapes.items():
        found = scheduler(weights={"label": {"schedule": name, "scale": 1.0}}).cumulative_weights("label")[:-1]
        # for "constant" a harmonic sum stands in for the logarithm: 1/(2T) per unit, and Euler's γ at the end
        torch.testing.assert_close(found, shape / shape.max(), rtol=0, atol=3e-3)


# ------------------------------------------------------------------------------------------------- times in training


def test_logit_normal_times_have_the_quantiles_of_scipy() -> None:
    for mean, std in [(0.0, 1.0), (-0.8, 1.6)]:
        options = {"timestep_sampling": "logit_normal", "logit_mean": mean, "logit_std": std}
        u = torch.linspace(1e-4, 1 - 1e-4, 997, dtype=torch.float64)
        expected = 1 / (1 + np.exp(-norm.ppf(u, loc=mean, scale=std)))
        flow = scheduler(**options).training_timesteps(u)
        np.testing.assert_allclose(flow / 1000, expected, rtol=1e-6)
        assert flow.dtype == torch.float32
        diffusion = MTDiffusionScheduler(**options).training_timesteps(u)
        assert diffusion.tolist() == np.floor(expected * 1000).astype(int).tolist()


@pytest.mark.parametrize("solver", [EULER, DPM, UNIPC])
def test_a_time_shift_moves_training_and_sampling_alike(solver: str) -> None:
    """σ -> s σ / (1 + (s − 1) σ), as the solver's own option does; s is √(positions / 1024), never below 1."""
    plain, shifted = scheduler(solver=solver), scheduler(solver=solver, time_shift=3.0)
    u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    share = plain.training_timesteps(u).double() / 1000
    expected = 1000 * 3 * share / (1 + 2 * share)
    torch.testing.assert_close(shifted.training_timesteps(u).double(), expected, rtol=1e-6, atol=0)
    option = "shift" if solver == EULER else "flow_shift"
    own = scheduler(solver=solver, solver_config={option: 3.0})
    for one in (plain, shifted, own):
        one.set_timesteps(10)
    assert torch.equal(shifted.timesteps, own.timesteps) and (shifted.timesteps[1:] > plain.timesteps[1:]).all()
    own = scheduler(solver=solver, solver_config={option: 2.0}, time_shift=3.0)
    assert own._solver.config[option] == 2.0
    assert [resolution_shift(*size) for size in ((8, 8), (32, 32), (64, 64), (128, 32))] == [1.0, 1.0, 2.0, 2.0]


def test_uniform_times_and_the_ends() -> None:
    u = torch.tensor([0.0, 0.25, 0.5, 1 - 2.0**-25], dtype=torch.float64)
    flow = scheduler(timestep_sampling="uniform").training_timesteps(u)
    torch.testing.assert_close(flow, (1000 * u).float(), rtol=0, atol=1e-4)
    assert MTDiffusionScheduler().training_timesteps(u).tolist() == [0, 250, 500, 999]
    for sched in (scheduler(), MTDiffusionScheduler(timestep_sampling="logit_normal")):
        ends = sched.training_timesteps(u[[0, -1]])
        assert 0 <= ends[0] < ends[1] <= sched.terminal_timestep
        assert sched.snr(ends).isfinite().all()


# ---------------------------------------------------------------------------------------------------------- solvers


def network(u_t: Tensor, timestep: float) -> Tensor:
    return torch.tanh(1.3 * u_t - timestep / 100)


def reference(solver: str, options: Options, steps: int, start: Tensor, prediction_type: str) -> list[Tensor]:
    """The trajectory of the diffusers class; its network is asked at σT, which the multistep classes would cut."""
    if solver == EULER:
        sched = diffusers.FlowMatchEulerDiscreteScheduler(**options)
        sched.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    else:
        named = {"velocity": "flow_prediction", "sample": "sample"}[prediction_type]
        sched = getattr(diffusers, solver)(use_flow_sigmas=True, prediction_type=named, **options)
        sched.set_timesteps(steps)
        sched.set_begin_index(0)
    extra = {} if solver == UNIPC else {"generator": torch.Generator().manual_seed(1)}
    trajectory = [start]
    for sigma, t in zip(sched.sigmas.tolist(), sched.timesteps, strict=False):
        output = network(trajectory[-1], float(torch.tensor(sigma) * 1000))
        trajectory.append(sched.step(output, t, trajectory[-1], **extra).prev_sample)
    return trajectory


def wrapped(sched: MTFlowMatchScheduler, steps: int, start: Tensor, encoding: Tensor | None) -> list[Tensor]:
    """The trajectory of u_t = z_t − c_t under the wrapper, for one constant encoding."""
    shown = None if encoding is None else {"label": encoding}
    sched.set_timesteps(steps, constant_encodings=True)
    generator, times = torch.Generator().manual_seed(1), [*sched.timesteps.tolist(), 0.0]
    z, trajectory = start + sched.aggregate(shown, times[0], start), [start]
    for now, then in zip(times, times[1:], strict=False):
        output = network(z - sched.aggregate(shown, now, z), now)
        z = sched.step(output, now, z, shown, generator=generator).prev_sample
        trajectory.append(z - sched.aggregate(shown, then, z))
    return trajectory


def test_every_solver_is_tested() -> None:
    assert {solver for solver, _ in CASES} == set(FLOW_SOLVERS)
    for solver, options in CASES:
        assert scheduler(solver=solver, solver_config=options).is_stochastic is (options == SDE)


@pytest.mark.parametrize(("solver", "options"), CASES + SHIFTED)
def test_zero_encodings_reproduce_diffusers_bit_for_bit(solver: str, options: Options) -> None:
    for steps, prediction_type in itertools.product([1, 2, 7, 50], ["velocity", "sample"]):
        if (solver, prediction_type) == (EULER, "sample"):
            continue  # Euler knows the velocity only: see the next test
        start = normal(0, dtype=torch.float32)
        expected = reference(solver, options, steps, start, prediction_type)
        for encoding in (None, torch.zeros(SHAPE)):
            sched = scheduler(solver=solver, solver_config=options, prediction_type=prediction_type)
            actual = wrapped(sched, steps, start, encoding)
            assert len(actual) == len(expected) == steps + 1
            assert all(sample.isfinite().all() for sample in actual)
            assert all(map(torch.equal, actual, expected))


def test_euler_is_the_convex_combination_when_z_0_is_predicted() -> None:
    sched, z = scheduler(solver=EULER, prediction_type="sample"), normal(0)
    sched.set_timesteps(8)
    for t, then in zip(sched.timesteps.tolist(), [*sched.timesteps.tolist()[1:], 0.0], strict=True):
        z_0 = torch.tanh(z)
        expected = z_0 + then / t * (z - z_0)  # u_s = (1 − σ_s) z_0 + σ_s ε with ε from u_t
        z = sched.step(z_0, t, z).prev_sample
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-6)  # diffusers steps in float32


@pytest.mark.parametrize(("solver", "options"), CASES + SHIFTED)
def test_a_constant_encoding_shifts_the_trajectory(solver: str, options: Options) -> None:
    for steps in [7, 50]:
        start, encoding = normal(0), normal(2)
        expected = reference(solver, options, steps, start, "velocity")
        actual = wrapped(scheduler(solver=solver, solver_config=options), steps, start, encoding)
        for u, by_diffusers in zip(actual, expected, strict=True):
            torch.testing.assert_close(u, by_diffusers, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("solver", "options"), CASES)
def test_clipping_bounds_the_last_sample(solver: str, options: Options) -> None:
    for prediction_type in ["velocity", "sample"]:

        def run(bound: float) -> Tensor:
            chosen = {"solver": solver, "solver_config": options, "prediction_type": prediction_type}
            sched = scheduler(clip_sample=True, clip_sample_range=bound, **chosen)
            return wrapped(sched, 10, normal(0), None)[-1]

        assert run(0.3).abs().max() == pytest.approx(0.3, abs=1e-6)
        free = wrapped(
            scheduler(solver=solver, solver_config=options, prediction_type=prediction_type), 10, normal(0), None
        )
        torch.testing.assert_close(run(100.0), free[-1], rtol=0, atol=1e-5)  # there and back, in float32


# ---------------------------------------------------------------------- the two-label mixture in closed form, theory 5


def generate(
    solver: str, options: Options, how: str, n: int, steps: int = 200, prediction_type: str = "velocity",
    prior: float = 0.5, changing: bool = True,
) -> Joint:  # fmt: skip
    sched = scheduler(solver=solver, solver_config=options, prediction_type=prediction_type)
    sched.set_timesteps(steps, constant_encodings=not changing)
    mixture, generator = Mixture(prior), torch.Generator().manual_seed(0)
    table = [0.0, *sched.cumulative_weights("label").tolist()]
    z = torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64)
    for t in sched.timesteps:
        sigma = t.double() / 1000
        weight = torch.tensor(np.interp(float(t), np.arange(1001), table))
        p, _ = mixture.posterior(z, 1 - sigma, sigma, weight)
        z_0, noise = mixture.expect(z, 1 - sigma, sigma, weight)
        output = {"velocity": noise - z_0, "sample": z_0}[prediction_type]
        z = sched.step(output, t, z, {"label": fed(how, p, generator)}, generator=generator).prev_sample
    return mixture.read(z, generator)


@pytest.mark.parametrize(("solver", "options"), CASES)
def test_joint_law_of_the_mixture(solver: str, options: Options) -> None:
    for prior, how in itertools.product([0.5, 0.7], ["draw", "mean"]):
        assert_is_the_joint_law(generate(solver, options, how, n=5_000, prior=prior), n=5_000, steps=200, prior=prior)


@pytest.mark.parametrize(("solver", "options"), CASES)
def test_joint_law_when_z_0_is_predicted(solver: str, options: Options) -> None:
    got = generate(solver, options, "draw", n=5_000, prediction_type="sample")
    assert_is_the_joint_law(got, n=5_000, steps=200)


def test_mode_and_the_corrector_over_commit() -> None:
    for solver, how, changing in [(DPM, "mode", True), (UNIPC, "mean", False)]:
        got = generate(solver, {}, how, n=2_000, changing=changing)
        assert got.std > 0.75 and got.between < 0.01 and got.agreement > 0.999  # the truth is 0.650, 0.115, 0.992


def test_stochastic_sampling_of_euler_halves_the_variance_around_the_modes() -> None:
    """Why it is refused. Around a mode ẑ_0 ≈ m + (1 − σ²/s²)(y − m) for y = z/(1 − σ), so a step changes the variance v
    of ẑ_0 by σ² − 2 v σ²/s², which rests at v = s²/2."""
    theirs, n = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), 5_000
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 200, 200))
    z, generator = normal(0, (n, 1, 1, 1)), torch.Generator().manual_seed(0)
    nothing = torch.zeros((), dtype=torch.float64)
    for t in theirs.timesteps:
        z_0, noise = Mixture(0.5).expect(z, 1 - t.double() / 1000, t.double() / 1000, nothing)
        z = theirs.step(noise - z_0, t, z, generator=generator).prev_sample
    spread = float((z.abs() - MODES[0]).std())
    assert spread == pytest.approx(S / 2**0.5, rel=0.06)


# --------------------------------------------------------------------------------------------------------- refusals


REFUSED = [
    ({"solver": "FlowMatchHeunDiscreteScheduler"}, "solver", "FlowMatchHeunDiscreteScheduler"),
    ({"solver": "EulerDiscreteScheduler"}, "solver", "EulerDiscreteScheduler"),
    *(({"solver": solver}, "solver", solver) for solver in sorted(set(SOLVERS) - set(FLOW_SOLVERS))),
    ({"solver": EULER, "solver_config": {"stochastic_sampling": True}}, "solver_config.stochastic_sampling", True),
    (
        {"solver": DPM, "solver_config": {"final_sigmas_type": "sigma_min"}},
        "solver_config.final_sigmas_type",
        "sigma_min",
    ),
    ({"prediction_type": "v_prediction"}, "prediction_type", "v_prediction"),
    ({"timestep_sampling": "cosine"}, "timestep_sampling", "cosine"),
    ({"logit_std": 0.0}, "logit_std", 0.0),
    ({"weights": {"label": {"schedule": "linear"}}}, "weights.label.schedule", "linear"),
]


def test_bad_arguments_are_refused_by_name() -> None:
    for arguments, key, value in REFUSED:
        with refused(key, value, *(FLOW_SOLVERS if key == "solver" else ())):
            scheduler(**arguments)


def test_saved_scheduler_comes_back_bit_for_bit(tmp_path: Path) -> None:
    learned = {"schedule": "learned", "scale": 1.2, "log_scale": 0.25}
    sched = scheduler(weights={"label": learned}, solver=UNIPC, num_train_timesteps=20)
    sched.save_pretrained(tmp_path)
    loaded = MTFlowMatchScheduler.from_pretrained(tmp_path)
    assert torch.equal(loaded.cumulative_weights("label"), sched.cumulative_weights("label"))
    trajectories = (wrapped(one, 5, normal(0), normal(2)) for one in (loaded, sched))
    assert all(map(torch.equal, *trajectories))
    other = MTFlowMatchScheduler.from_config(sched.config, solver=EULER)
    assert (other.config.solver, len(other)) == (EULER, 20)
    with refused("timestep", 500.0):
        steps = scheduler(solver=EULER)
        steps.set_timesteps(2)
        steps.step(normal(0), 500.0, normal(0))
