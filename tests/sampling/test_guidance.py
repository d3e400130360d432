"""Head guidance is exact for exact heads, aggregation alone is not: a two-label mixture in closed form."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch
from torch import Generator, Tensor, nn

from mmdiff.backbones import Backbone, Observation
from mmdiff.backbones.base import BackboneOutput
from mmdiff.model import MTDiffusionModel
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.schedulers import SOLVERS, MTDiffusionScheduler

DDPM, DDIM, DPM = "DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"
LABELS = torch.tensor([1.0, -1.0], dtype=torch.float64)  # E(0), E(1)
MODES = torch.tensor([0.6, -0.6], dtype=torch.float64)  # z_0 | label k ~ N(m_k, s²)
PRIOR = torch.tensor([0.7, 0.3], dtype=torch.float64)
S = 0.25
SMALL = {"beta_schedule": "linear", "num_train_timesteps": 100, "allow_nonzero_terminal": True}  # ā_T = 0.36
LAYERS = {"block_out_channels": [4], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}


class ExactMixture(Backbone):
    """E[· | z_t], the label marginalised, and the logits of p(label | z_t) as pooled vector; the flag says whether the
    label stands in z_t."""

    def __init__(self, scheduler: MTDiffusionScheduler) -> None:
        nn.Module.__init__(self)
        self.precision = nn.Parameter(torch.zeros((), dtype=torch.float64))  # a model computes in its weights'
        self.scheduler = scheduler

    def forward(self, sample: Tensor, timestep: Tensor, observation: Observation) -> BackboneOutput:
        a_bar = self.scheduler.alphas_cumprod[timestep][:, None]
        weight = self.scheduler.cumulative_weights("label")[timestep][:, None] * observation.flags[:, 2:3]
        variance = a_bar * S**2 + 1 - a_bar
        residual = sample.flatten(1) - a_bar.sqrt() * MODES - weight * LABELS  # (B, 2)
        logits = PRIOR.log() - residual**2 / (2 * variance)
        mean = MODES + a_bar.sqrt() * S**2 / variance * residual  # E[z_0 | z_t, k]
        noise = (residual + a_bar.sqrt() * (MODES - mean)) / (1 - a_bar).sqrt()  # E[ε | z_t, k]
        prediction = output_of(self.scheduler.config.prediction_type, a_bar, mean, noise)
        expected = (logits.softmax(1) * prediction).sum(1)[:, None, None, None]
        return BackboneOutput(expected, torch.zeros_like(sample), logits)

    @classmethod
    def widths(cls, **settings: Any) -> Any:
        raise NotImplementedError


def output_of(kind: str, a_bar: Tensor, z_0: Tensor, noise: Tensor) -> Tensor:
    """What a network of this prediction type gives."""
    v = a_bar.sqrt() * noise - (1 - a_bar).sqrt() * z_0
    return {"v_prediction": v, "epsilon": noise, "sample": z_0}[kind]


def mixture(solver: str = DDIM, schedule: str = "bump", **scheduler: Any) -> MTDiffusionPipeline:
    """A pipeline whose network and label head are exact, in float64."""
    torch.manual_seed(0)
    model = MTDiffusionModel(
        modality_config={
            "image": {"kind": "image", "channels": 1, "size": 1},
            "label": {"kind": "label", "num_classes": 2},
        },
        backbone_config={"kind": "unet", **LAYERS},
    ).double()
    made = MTDiffusionScheduler(
        solver=solver, clip_sample=False, weights={"label": {"schedule": schedule, "scale": 1.0}}, **scheduler
    )
    model.backbone, model.modalities["label"].head = ExactMixture(made), nn.Identity()
    model.modalities["label"].table.data = LABELS.reshape(2, 1, 1, 1).clone()
    pipe = MTDiffusionPipeline(model=model.eval(), scheduler=made)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: MTDiffusionPipeline, count: int, steps: int, **arguments: Any) -> Tensor:
    """z_0 given label 0, (count,)."""
    arguments = {"generator": Generator().manual_seed(0), "output_type": "pt", **arguments}
    found = pipe(count, {"label": 0}, steps, **arguments)
    assert found.samples["label"].tolist() == [0] * count
    return found.samples["image"].flatten()


def conditional_trajectory(solver: str, kind: str, count: int, steps: int, shift: Tensor | float) -> Tensor:
    """diffusers' own solver, driven by E[z_0 | u_t, label 0] of Bayes' rule: u_t is a diffusion of N(m_0, s²)."""
    common = {"num_train_timesteps": 100, "beta_schedule": "linear", "timestep_spacing": "trailing"}
    more = {"clip_sample": False} if not SOLVERS[solver].multistep else {}
    scheduler = getattr(diffusers, solver)(prediction_type=kind, **common, **more)
    scheduler.set_timesteps(steps)
    generator = Generator().manual_seed(0)
    u = torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64) - shift
    extra = {"generator": generator} if SOLVERS[solver].takes_generator else {}
    for t in scheduler.timesteps:
        a_bar = scheduler.alphas_cumprod.double()[t]
        mean = MODES[0] + a_bar.sqrt() * S**2 / (a_bar * S**2 + 1 - a_bar) * (u - a_bar.sqrt() * MODES[0])
        noise = (u - a_bar.sqrt() * mean) / (1 - a_bar).sqrt()
        u = scheduler.step(output_of(kind, a_bar, mean, noise), t, u, **extra).prev_sample
    return u.flatten()


@pytest.mark.parametrize("solver", [DDPM, DDIM, DPM])
def test_head_guidance_with_exact_heads_is_the_conditional_sampler(solver: str) -> None:
    """Every step's E[z_0 | z_t, x] is that of Bayes' rule, whether the label stands in z_t or not."""
    for kind, ways in itertools.product(
        ["v_prediction", "epsilon", "sample"], ["head-guidance", ("aggregation", "head-guidance")]
    ):
        pipe = mixture(solver, prediction_type=kind, **SMALL)
        shift = pipe.scheduler.cumulative_weights("label")[-1] if "aggregation" in ways else 0.0
        expected = conditional_trajectory(solver, kind, 20, 10, shift)
        found = images(pipe, 20, 10, conditioning=ways)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # diffusers' tables are float32
        other = images(pipe, 20, 10, conditioning=ways, head_guidance_scale=0.5)
        assert (other - expected).abs().max() > 1e-2


def test_head_guidance_draws_from_the_conditional_law_and_plug_in_alone_does_not() -> None:
    for solver in [DDPM, DPM]:
        n, pipe = 4000, mixture(solver)  # cosine: the first steps, with ā_t < 1e-4, are not guided
        guided = images(pipe, n, 100, conditioning="head-guidance")
        assert float(guided.mean()) == pytest.approx(float(MODES[0]), abs=4 * S / n**0.5 + 0.01)
        assert float(guided.std()) == pytest.approx(S, abs=4 * S / (2 * n) ** 0.5 + 0.01)
        plugged = images(pipe, n, 100, conditioning="aggregation")
        assert float(plugged.mean()) < 0.5 and float(plugged.std()) > 0.3


def test_the_scale_sharpens_what_the_head_says() -> None:
    pipe = mixture()
    means = [images(pipe, 500, 20, conditioning="head-guidance", head_guidance_scale=s).mean() for s in (0.0, 0.5, 1.0)]
    assert means[0] < means[1] < means[2]
    by_name = images(pipe, 5, 20, conditioning="head-guidance", head_guidance_scale={"label": 0.5})
    assert torch.equal(by_name, images(pipe, 5, 20, conditioning={"label": ["head-guidance"]}, head_guidance_scale=0.5))


def test_weights_are_left_without_gradients() -> None:
    pipe = mixture()
    assert not images(pipe, 3, 4, conditioning="head-guidance").requires_grad
    assert all(parameter.grad is None for parameter in pipe.model.parameters())
