"""The bound on a toy whose law is known: a one-pixel anchor, two labels, and the exact network.

x_0 | k ~ N(m_k, s²), P(k) = p_k, E(k) = ±1. Given the label everything is Gaussian, so every term's expectation is a
one-dimensional integral over z_t, computed here in numpy from ā_t and W_t alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from networks import random_model
from torch import Tensor, nn

from mmdiff.backbones import Observation
from mmdiff.evaluation.elbo import Elbo, elbo
from mmdiff.modalities import Image, Label, Shape
from mmdiff.model import MTDiffusionModel, MTDiffusionModelOutput
from mmdiff.schedulers import MTDiffusionScheduler

P = np.array([0.7, 0.3])  # of the labels
M = np.array([-0.6, 0.8])  # their means of x_0
S = 0.3  # and one standard deviation
E = np.array([1.0, -1.0])  # their encodings
SHAPE = Shape((1, 1, 1), 1, 1)
NOTHING = torch.zeros(0)  # of the backbone's pooled vector, which the bound does not ask for
BUMP, CONSTANT, NONE = ({"schedule": name, "scale": 0.5} for name in ("bump", "constant", "none"))
each_process = pytest.mark.parametrize(
    ("weight", "prediction_type"),
    [(BUMP, "sample"), (BUMP, "v_prediction"), (CONSTANT, "v_prediction"), (NONE, "sample")],
)


def scheduler(
    steps: int, weight: Mapping[str, Any], prediction_type: str = "sample", betas: list[float] | None = None
) -> MTDiffusionScheduler:
    return MTDiffusionScheduler(
        num_train_timesteps=steps,
        trained_betas=betas,
        prediction_type=prediction_type,
        weights={"label": dict(weight)},
        allow_nonzero_terminal=True,  # `constant` ends at W_T = 0.015 · scale, in few steps at more
    )


class Law(NamedTuple):
    """Of (z_t, k) at one t, arrays with a last axis for k: densities p_k q(z | k), and what z and k say of x_0."""

    joint: Any
    mean: Any  # E[x_0 | z, k]
    variance: Any  # Var[x_0 | z, k], a number
    root: float  # √ā_t
    sigma: float  # √(1 − ā_t)
    shift: Any  # c_t of each label

    @property
    def label(self) -> Any:
        """p(k | z)."""
        return self.joint / self.joint.sum(-1, keepdims=True)

    def prediction(self, z: Any, kind: str) -> Any:
        """E[x_0 | z] or E[v | z], what the exact network predicts, v = √ā ε − σ x_0."""
        if kind == "sample":
            return (self.label * self.mean).sum(-1)
        noise = (z[..., None] - self.shift - self.root * self.mean) / self.sigma
        return (self.label * (self.root * noise - self.sigma * self.mean)).sum(-1)


def law(process: MTDiffusionScheduler, t: int, z: np.ndarray) -> Law:
    """The exact posterior at timestep t for states z (…)."""
    a_bar, weight = float(process.alphas_cumprod[t]), float(process.cumulative_weights("label")[t])
    root, noise, shift = math.sqrt(a_bar), 1 - a_bar, weight * E
    total = a_bar * S**2 + noise  # Var[z | k]
    offset = z[..., None] - root * M - shift
    joint = P * np.exp(-0.5 * offset**2 / total) / math.sqrt(2 * math.pi * total)
    return Law(joint, M + root * S**2 / total * offset, S**2 * noise / total, root, math.sqrt(noise), shift)


class ExactNetwork:
    """What `elbo` uses of a model, with the exact posterior in the network's place; float64."""

    anchor, generated, filling, gains, dtype = "image", ("label",), (), {}, torch.float64

    def __init__(self, process: MTDiffusionScheduler) -> None:
        label = Label(SHAPE, num_classes=2)
        label.table = nn.Parameter(torch.tensor(E).reshape(2, 1, 1, 1))
        self.modalities = nn.ModuleDict({"image": Image(SHAPE, channels=1, size=1, head=False), "label": label})
        self.process = process

    def encode(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.modalities[name].encode(value) for name, value in values.items()}

    def observation(self, *states: Mapping[str, Tensor], like: Tensor, noisy: Mapping[str, Any]) -> Observation:
        return Observation(like, like)  # of no use to it: whether the label is aggregated is known from the weights

    def __call__(self, sample: Tensor, timestep: Tensor, observation: Observation) -> MTDiffusionModelOutput:
        z = sample.flatten().numpy()
        posterior = law(self.process, int(timestep[0]), z)
        prediction = posterior.prediction(z, self.process.config.prediction_type)
        params = {"label": torch.from_numpy(posterior.label).clamp(min=1e-300).log()}
        return MTDiffusionModelOutput(torch.from_numpy(prediction).reshape(sample.shape), params, NOTHING)


class ConstantNetwork(ExactNetwork):
    """z_0 is 0.3 and the label unknown, whatever z_t is."""

    def __call__(self, sample: Tensor, timestep: Tensor, observation: Observation) -> MTDiffusionModelOutput:
        params = {"label": torch.zeros(len(sample), 2, dtype=torch.float64)}
        return MTDiffusionModelOutput(torch.full_like(sample, 0.3), params, NOTHING)


def draw(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    label = torch.multinomial(torch.tensor(P), count, replacement=True, generator=generator)
    x_0 = torch.tensor(M)[label] + S * torch.randn(count, generator=generator, dtype=torch.float64)
    return {"image": x_0.reshape(count, 1, 1, 1), "label": label}


def run(process: MTDiffusionScheduler, count: int, **settings: Any) -> Elbo:
    generator = torch.Generator().manual_seed(1)
    return elbo(ExactNetwork(process), process, draw(count), generator=generator, levels=None, **settings)


def by_quadrature(process: MTDiffusionScheduler) -> dict[str, float]:
    """The expectation of every term, with the difference of two SNRs for each KL of L1 and densities for L3."""
    kind, steps = process.config.prediction_type, len(process)
    z = np.linspace(-8, 8, 4001)  # |√ā m + c| < 2 and standard deviation ≤ 1: six of them beyond
    dz = z[1] - z[0]
    a_bar = process.alphas_cumprod.numpy()
    snr = a_bar / (1 - a_bar)
    terms = {"l1": 0.0, "l2/label": 0.0}
    for t in range(steps):
        at = law(process, t, z)
        guess = at.prediction(z, kind)[:, None]
        if kind == "v_prediction":
            guess = at.root * (z[:, None] - at.shift) - at.sigma * guess
        error = float((at.joint * ((at.mean - guess) ** 2 + at.variance)).sum() * dz)  # E (x_0 − x̂_0)²
        terms["l2/label"] -= float((at.joint * np.log(at.label.clip(1e-300))).sum() * dz)
        if t:
            terms["l1"] += 0.5 * (snr[t - 1] - snr[t]) * error
        else:
            terms["l3"] = 0.5 * math.log(2 * math.pi * (1 - a_bar[0])) + 0.5 * error / (1 - a_bar[0])
    second = float((P * (at.root**2 * (M**2 + S**2) + 2 * at.root * M * at.shift + at.shift**2)).sum())
    terms["l0"] = 0.5 * (second - a_bar[-1] - math.log(1 - a_bar[-1]))  # E of the squared mean of z_T, and its variance
    return terms


def entropy(with_label: bool) -> float:
    """H(x_0, k) = H(k) + ½ log 2πe s², or the differential entropy of x_0 alone."""
    if with_label:
        return float(-(P * np.log(P)).sum() + 0.5 * math.log(2 * math.pi * math.e * S**2))
    x = np.linspace(-8, 8, 20001)
    density = (P * np.exp(-0.5 * ((x[:, None] - M) / S) ** 2)).sum(1) / math.sqrt(2 * math.pi) / S
    return float(-(density * np.log(density.clip(1e-300))).sum() * (x[1] - x[0]))


def standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


# -------------------------------------------------------------------------------------------------- the known law


@each_process
def test_every_term_has_its_closed_expectation(weight: dict[str, Any], prediction_type: str) -> None:
    process = scheduler(20, weight, prediction_type)
    found, expected = run(process, 20_000).terms, by_quadrature(process)
    assert found.keys() == expected.keys()
    for name, term in found.items():
        assert term.shape == (20_000,) and term.dtype == torch.float64
        assert abs(float(term.mean()) - expected[name]) < 4 * standard_error(term) + 1e-9, name


@each_process
@pytest.mark.parametrize("steps", [2, 20, 200])
def test_it_bounds_the_entropy(weight: dict[str, Any], prediction_type: str, steps: int) -> None:
    process = scheduler(steps, weight, prediction_type)
    terms = by_quadrature(process)
    assert sum(terms.values()) > entropy(with_label=True)
    assert min(terms["l0"], terms["l1"], terms["l2/label"]) >= 0
    if steps == 20:
        nats = run(process, 20_000).nats
        assert float(nats.mean()) > entropy(with_label=True) - 4 * standard_error(nats)


def even_betas(steps: int) -> list[float]:
    """log SNR falls evenly from 9 to −12, so that as T grows the steps become small everywhere.

    On the standard schedules ā_1 tends to 1 too: SNR(1)/SNR(2) → 2, SNR(2)/SNR(3) → 3/2 …, and even for the exact
    network a gap of ½ Σ (1/t − log(1 + 1/t)) = γ/2 ≈ 0.29 nats stays, since p_θ moves with the variance β̃_t.
    """
    a_bar = 1 / (1 + np.exp(-np.linspace(9, -12, steps)))
    return (1 - a_bar / np.concatenate([[1.0], a_bar[:-1]])).tolist()


def test_without_aggregation_the_anchors_terms_tend_to_its_entropy() -> None:
    """L0 + L1 + L3 of an ordinary diffusion: L1 is a Riemann sum, its gap falls like 1/T (Kingma et al., 2021)."""
    gaps = []
    for steps, count in ((10, 4000), (100, 4000), (1000, 400)):
        process = scheduler(steps, NONE, betas=even_betas(steps))
        terms = by_quadrature(process)
        gaps.append(terms["l0"] + terms["l1"] + terms["l3"] - entropy(with_label=False))
        found = run(process, count).terms
        anchor = found["l0"] + found["l1"] + found["l3"]
        assert abs(float(anchor.mean()) - entropy(with_label=False) - gaps[-1]) < 4 * standard_error(anchor)
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2] > 0


def test_random_timesteps_are_unbiased() -> None:
    """Every timestep once on its own, each scaled up to T: their average is the full sum."""
    process, count = scheduler(10, BUMP), 4000
    expected = by_quadrature(process)
    singles = [run(process, count, timesteps=torch.tensor([t])).terms for t in range(10)]
    for name in expected:
        means = torch.stack([terms[name].mean() for terms in singles])
        errors = torch.tensor([standard_error(terms[name]) for terms in singles])
        error = float(errors.square().sum().sqrt()) / 10
        assert abs(float(means.mean()) - expected[name]) < 4 * error + 4 * standard_error(singles[0][name]), name


def test_bits_per_dim() -> None:
    terms = {"l0": torch.tensor([0.0, 64 * math.log(2)]), "l1": torch.tensor([1.0, 2.0])}
    result = Elbo(terms, dimensions=64)
    torch.testing.assert_close(result.bits_per_dim("l0"), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(result.nats, torch.tensor([1.0, 2.0 + 64 * math.log(2)]))


# --------------------------------------------------------------------------------------------------- grey levels


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_l3_is_a_mass_of_grey_levels_whatever_the_anchors_scale(scale: float) -> None:
    """Where the prediction does not depend on z_1 the masses of all values of x_0 sum to one."""
    process = scheduler(20, NONE)
    network = ConstantNetwork(process)
    network.modalities["image"] = Image(SHAPE, channels=1, size=1, head=False, scale=scale)
    grid = torch.linspace(-1, 1, 256, dtype=torch.float64).reshape(-1, 1, 1, 1)
    values = {"image": grid, "label": torch.zeros(256, dtype=torch.int64)}
    found = elbo(network, process, values, timesteps=torch.tensor([0]), levels=256)
    masses = (-found.terms["l3"] / len(process)).exp()  # one timestep of T
    assert float(masses.sum()) == pytest.approx(1.0, abs=1e-9)


def real_model(seed: int = 0) -> MTDiffusionModel:
    return random_model(
        {"image": {"kind": "image", "channels": 1, "size": 8}, "label": {"kind": "label", "num_classes": 2}}, seed
    )


def real_values() -> dict[str, Tensor]:
    levels = torch.randint(256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return {"image": levels / 127.5 - 1, "label": torch.tensor([0, 1, 1])}


def test_a_real_model_has_finite_terms_and_the_same_for_the_same_generator() -> None:
    model, process, values = real_model(), scheduler(8, BUMP, "v_prediction"), real_values()
    one, again, other = (elbo(model, process, values, torch.Generator().manual_seed(k)) for k in (0, 0, 1))
    assert one.dimensions == 64
    assert one.terms.keys() == {"l0", "l1", "l2/label", "l3"}
    for name, term in one.terms.items():
        assert term.shape == (3,) and term.isfinite().all() and (term >= 0).all()  # masses: L3 is positive too
        assert torch.equal(term, again.terms[name])
    assert not torch.equal(one.terms["l1"], other.terms["l1"])


@pytest.mark.parametrize(("weight", "aggregated"), [(BUMP, True), (NONE, False), ({**BUMP, "scale": 0.0}, False)])
def test_only_modalities_with_weight_are_flagged_as_aggregated(weight: dict[str, Any], aggregated: bool) -> None:
    """Training never sets this flag without a weight, so the network would meet it for the first time here."""
    model, process = real_model(), scheduler(8, weight, "v_prediction")
    before = elbo(model, process, real_values(), torch.Generator().manual_seed(0)).nats
    flag = 2 * model.names.index("label")  # (aggregated, observed) of every modality, by name
    with torch.no_grad():
        model.backbone.flags[0].weight[:, flag] += 1.0
    after = elbo(model, process, real_values(), torch.Generator().manual_seed(0)).nats
    assert torch.equal(before, after) is not aggregated
