"""The exact bound on −log p_θ(x_0, X), term by term: L0 + L1 + L2 + L3, Eq. (7)–(10)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdiff import losses
from mmdiff.build import state_probabilities
from mmdiff.config import Config
from mmdiff.data import Table
from mmdiff.errors import InputError
from mmdiff.evaluation.judges import complete
from mmdiff.evaluation.report import Row
from mmdiff.likelihoods import Gaussian
from mmdiff.metrics.bootstrap import scored
from mmdiff.model import MTDiffusionModel
from mmdiff.observation import Noisy
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.schedulers import MTScheduler

_OWN = ("l0", "l1", "l3")  # terms of a diffused modality


@dataclass
class Elbo:
    """Terms by name in nats, per sample (B,): "l0", "l1", "l2/<modality>", "l3"; ``dimensions`` of x_0.

    A diffused modality has "l0/<modality>", "l1/<modality>" and "l3/<modality>" instead of its L2: at the anchor's
    noise level it is denoised with it, and its head reads it once, at t = 1.

    Reading every modality at every step makes the bound loose, L2 counts T times: look at the terms apart.
    """

    terms: dict[str, Tensor]
    dimensions: int

    @property
    def nats(self) -> Tensor:
        """The bound, (B,)."""
        return sum(self.terms.values())

    def bits_per_dim(self, name: str) -> Tensor:
        """One term, in bits per dimension of x_0: (B,)."""
        return self.terms[name] / (self.dimensions * math.log(2))


def recovered(model: MTDiffusionModel) -> list[str]:
    """Modalities with an L2 term: those with a head for their own value. A masked image adds nothing to x_0."""
    return [name for name in model.generated if name not in model.filling]


def elbo_rows(pipeline: MTDiffusionPipeline, config: Config, held_out: Table) -> list[Row]:
    """The bound on held-out rows, every term by name, in nats and in bits per dimension of x_0, with 95 % intervals.

    Args:
        pipeline: the model.
        config: `evaluate.num_samples` rows at most are used, those that have all modalities of the bound.
        held_out: real rows.

    Raises:
        InputError: nothing is denoised by this model.
    """
    model, anchor = pipeline.model, pipeline.model.anchor
    if state_probabilities(config, anchor).observed == 1 or config.states.anchor_hidden == 1:
        raise InputError("--elbo", True, "needs a model that denoises; this one was trained without")
    names = [anchor, *recovered(model)]
    columns = complete(held_out.all(min(config.evaluate.num_samples, len(held_out))), *names)
    latent = model.modalities[anchor].frozen is not None
    generator, parts = torch.Generator().manual_seed(config.evaluate.seeds[0]), []
    for batch in zip(*(column.split(config.sample.batch_size) for column in columns), strict=True):
        values = {name: value.to(model.device) for name, value in zip(names, batch, strict=True)}
        parts.append(elbo(model, pipeline.scheduler, values, generator, levels=None if latent else 256))
    terms = {name: torch.cat([part.terms[name] for part in parts]).cpu() for name in parts[0].terms}
    terms["all"] = sum(terms.values())
    bits = 1 / (parts[0].dimensions * math.log(2))
    about = {"of": "the latent, as a density" if latent else "256 levels"}
    return [
        Row("bound on -log p", name, about, {"n": len(nats)} | scored("nats", nats) | scored("bits/dim", nats * bits))
        for name, nats in terms.items()
    ]


@torch.no_grad()
def elbo(
    model: MTDiffusionModel,
    scheduler: MTScheduler,
    values: Mapping[str, Tensor],
    generator: torch.Generator | None = None,
    timesteps: Tensor | None = None,
    levels: int | None = 256,
) -> Elbo:
    """The bound for a batch: every modality with weights is aggregated, as in the source, diffused ones are denoised.

    Args:
        model, scheduler: the network and the forward process; `scheduler.config.clip_sample` is not applied.
        values: {modality: (B, …)} of all modalities.
        generator: for the states z_t, one per step.
        timesteps: the steps t − 1 in 0 … T − 1 to sum over; default all. A subset is scaled up to T, an unbiased
            estimate if it was drawn at random; index 0 must then be drawn like the others.
        levels: grey levels of x_0 in [−1, 1] for L3, or None for a density.
    """
    anchor = model.modalities[model.anchor]
    z_0 = anchor.encode(values[model.anchor]).double()  # (B, C, H, W)
    weighted = [name for name in sorted(scheduler.config.weights or {}) if scheduler.cumulative_weights(name).max() > 0]
    weighted = [name for name in weighted if name not in model.gains]
    encodings = {n: e.double() for n, e in model.encode({name: values[name] for name in weighted}).items()}
    signals = {name: model.signal(name, values[name]).double() for name in sorted(model.gains)}
    everywhere = torch.ones(len(z_0), dtype=torch.bool, device=z_0.device)
    total = len(scheduler)
    chosen = torch.arange(total) if timesteps is None else timesteps
    scale = total / len(chosen)
    generated = [name for name in recovered(model) if name not in signals]
    names = ["l1", "l3", *(f"l2/{name}" for name in generated), *(f"{k}/{name}" for name in signals for k in _OWN)]
    terms = {name: torch.zeros(len(z_0), dtype=torch.float64, device=z_0.device) for name in names}
    last = torch.full((len(z_0),), scheduler.terminal_timestep)
    terms["l0"] = losses.terminal_kl(scheduler.marginal(z_0, last, encodings))
    terms |= {f"l0/{name}": losses.terminal_kl(scheduler.marginal(x, last)) for name, x in signals.items()}
    aggregated = dict.fromkeys(weighted, everywhere)
    for t in chosen.tolist():
        steps = torch.full((len(z_0),), t + scheduler.first_timestep, device=z_0.device)
        noise = torch.randn(z_0.shape, generator=generator, dtype=z_0.dtype).to(z_0.device)
        z_t = scheduler.marginal(z_0, steps, encodings).sample(noise)
        like = z_t.to(model.dtype)
        noisy = {name: _noisy(scheduler, signal, steps, generator) for name, signal in signals.items()}
        output = model(like, steps, model.observation({}, aggregated, {}, like=like, noisy=noisy))
        original = scheduler.predict_original_sample(output.prediction.double(), steps, z_t, encodings)
        if t > 0:
            posterior = scheduler.posterior(z_0, z_t, steps, encodings)
            predicted = scheduler.posterior(original, z_t, steps, encodings)
            terms["l1"] += scale * losses.transition_kl(posterior, predicted)
        else:
            variance = scheduler.marginal(z_0, steps).variance  # 1 − ā_1, the noise of z_1
            slope = anchor.unencode(torch.ones_like(z_0)) - anchor.unencode(torch.zeros_like(z_0))
            predicted = Gaussian(anchor.unencode(original), variance * slope**2)
            terms["l3"] += scale * losses.anchor_nll(predicted, anchor.unencode(z_0), levels)
        for name, signal in signals.items():
            params, z = output.params[name].double(), noisy[name].sample
            if t > 0:
                posterior = scheduler.posterior(signal, z, steps)
                predicted = scheduler.posterior(model.expected_signal(name, params), z, steps)
                terms[f"l1/{name}"] += scale * losses.transition_kl(posterior, predicted)
            else:
                terms[f"l3/{name}"] += scale * _nats(model, name, params, values)
        for name in generated:
            terms[f"l2/{name}"] += scale * _nats(model, name, output.params[name].double(), values)
    return Elbo(terms, dimensions=z_0[0].numel())


def _nats(model: MTDiffusionModel, name: str, params: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """−log p_θ(x_i | z_t), (B,)."""
    modality = model.modalities[name]
    return losses.recovery_nll(modality.nll(params, values[name]), modality.dimensions)


def _noisy(scheduler: MTScheduler, signal: Tensor, steps: Tensor, generator: torch.Generator | None) -> Noisy:
    """z^i at the anchor's time."""
    noise = torch.randn(signal.shape, generator=generator, dtype=signal.dtype).to(signal.device)
    return Noisy(scheduler.marginal(signal, steps).sample(noise), scheduler.share(steps))
