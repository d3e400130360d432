"""One evaluation of the network in a reverse step: branches, classifier-free guidance, head guidance, feedback.

Head guidance adds the gradient of the model's own log p_θ(x_i | z_t): with z_t = signal · z_0 + c + noise · ε,
Tweedie's formula (Efron, 2011) and Bayes' rule give E[z_0 | z_t, x_i] from E[z_0 | z_t].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmdiff.backbones import Observation
from mmdiff.modalities import Modality
from mmdiff.model import MTDiffusionModel
from mmdiff.observation import Noisy
from mmdiff.sampling.conditioning import Conditioning
from mmdiff.schedulers import MTScheduler

MIN_SIGNAL = 1e-2  # smallest s_t with head guidance, which divides a gradient by s_t


class Branches(NamedTuple):
    """The network's second input, for K branches along the batch: with all conditions, then without one each.

    ``observation`` is (K · B, …) for K = 1 + len(``left_out``).
    """

    observation: Observation
    left_out: tuple[str, ...]


class Evaluation(NamedTuple):
    """``prediction`` (B, C, H, W), guided; ``params`` by modality, of the branch with all conditions; ``unseen``
    {condition with a head: its params in the branch without it}; ``signals`` {diffused modality that is denoised: its
    expected signal, guided}."""

    prediction: Tensor
    params: dict[str, Tensor]
    unseen: dict[str, Tensor]
    signals: dict[str, Tensor]


def branches_of(
    model: MTDiffusionModel,
    values: Mapping[str, Tensor],
    aggregated: Iterable[str],
    concatenated: Iterable[str],
    left_out: tuple[str, ...],
    like: Tensor,
    noisy: Mapping[str, Noisy] | None = None,
) -> Branches:
    """The branches; without ``noisy`` they are the same for every step of a run.

    Args:
        model: the networks.
        values: of the observed modalities.
        aggregated, concatenated: names of the modalities in c_t and in the observation channels.
        left_out: conditions that one further branch each leaves out.
        like: z_t (B, C, H, W).
        noisy: signals of diffused modalities that are denoised; all branches see them.
    """
    everywhere = torch.ones(len(like), dtype=torch.bool, device=like.device)
    in_mean = dict.fromkeys(aggregated, everywhere)
    parts = [
        model.observation(values, in_mean, dict.fromkeys(set(concatenated) - {name}, everywhere), like, noisy)
        for name in (None, *left_out)
    ]
    channels, flags = torch.cat([part.channels for part in parts]), torch.cat([part.flags for part in parts])
    return Branches(Observation(channels, flags), left_out)


def guided(
    model: MTDiffusionModel,
    sample: Tensor,
    timesteps: Tensor,
    branches: Branches,
    scales: Mapping[str, float],
    heads: Collection[str] | None = None,
    denoised: Collection[str] = (),
) -> Evaluation:
    """Classifier-free guidance with all branches in one batch: full + Σ_i (s_i − 1) (full − full without i).

    With one condition this is the usual absent + s (observed − absent). The heads, by default all, are those of the
    full branch. ``denoised`` are diffused modalities whose expected signals are guided alike.
    """
    count = 1 + len(branches.left_out)
    if count == 1:
        output = model(sample, timesteps, branches.observation, heads)
        signals = {name: model.expected_signal(name, output.params[name]) for name in denoised}
        return Evaluation(output.prediction, output.params, {}, signals)
    output = model(sample.repeat(count, 1, 1, 1), timesteps.repeat(count), branches.observation, heads)

    def mixed(all_branches: Tensor) -> Tensor:
        full, *without = all_branches.chunk(count)
        pairs = [(scales[name], part) for name, part in zip(branches.left_out, without, strict=True) if name in scales]
        return full + sum((scale - 1.0) * (full - part) for scale, part in pairs)

    read = {name: params.chunk(count) for name, params in output.params.items()}
    return Evaluation(
        prediction=mixed(output.prediction),
        params={name: parts[0] for name, parts in read.items()},
        unseen={name: read[name][k] for k, name in enumerate(branches.left_out, start=1) if name in read},
        signals={name: mixed(model.expected_signal(name, output.params[name])) for name in denoised},
    )


class Denoiser:
    """One evaluation of the network in a reverse step, with classifier-free guidance and head guidance.

    Args:
        model, scheduler: of the pipeline.
        values: {observed modality: (B, …)}.
        conditioning: of the call.
        aggregated: {condition: its encoding in c_t (B, C, H, W)}.
        count: B.
    """

    def __init__(
        self,
        model: MTDiffusionModel,
        scheduler: MTScheduler,
        values: Mapping[str, Tensor],
        conditioning: Conditioning,
        aggregated: Mapping[str, Tensor],
        count: int,
    ) -> None:
        self.model, self.scheduler, self.values, self.conditioning = model, scheduler, values, conditioning
        self.like = torch.zeros(count, *model.space, device=model.device, dtype=model.value_dtype)
        self.branches = self._branches()
        # encodings of conditions with head guidance that are aggregated but not concatenated
        only_mean = set(conditioning.head_guidance) & set(aggregated) - conditioning.concatenated
        self.only_mean = {name: aggregated[name] for name in sorted(only_mean)}

    def _branches(self, noisy: Mapping[str, Noisy] | None = None) -> Branches:
        chosen = self.conditioning
        in_mean, shown = chosen.in_mean, chosen.concatenated
        return branches_of(self.model, self.values, in_mean, shown, chosen.left_out, self.like, noisy)

    def __call__(
        self,
        sample: Tensor,
        timesteps: Tensor,
        now: int,
        heads: Collection[str] = (),
        noisy: Mapping[str, Noisy] | None = None,
    ) -> Evaluation:
        """An evaluation at z_t (B, C, H, W), ``timesteps`` (B,).

        Args:
            sample, timesteps: z_t, and its timestep for every sample.
            now: the timestep as a Python number.
            heads: that the caller reads.
            noisy: signals of diffused modalities that are denoised, at the same noise level.
        """
        noisy = noisy or {}
        scales, guiding = self.conditioning.guidance, self.conditioning.head_guidance
        signal, noise = self.scheduler.signal_and_noise(now) if guiding else (0.0, 1.0)
        if signal < MIN_SIGNAL:
            branches = self._branches(noisy) if noisy else self.branches
            return guided(self.model, sample, timesteps, branches, scales, {*heads, *noisy}, noisy)
        read = {*heads, *guiding, *self.only_mean, *noisy}
        with torch.enable_grad():
            z_t = sample.detach().requires_grad_()
            noisy = {name: Noisy(part.sample.detach().requires_grad_(), part.share) for name, part in noisy.items()}
            branches = self._branches(noisy) if noisy else self.branches
            evaluation = guided(self.model, z_t, timesteps, branches, scales, read, noisy)
            inputs = [z_t, *(part.sample for part in noisy.values())]
            score, *scores = torch.autograd.grad(self._log_likelihood(evaluation), inputs)
        signals = {
            name: evaluation.signals[name].detach() + (noise**2 / signal) * own
            for name, own in zip(noisy, scores, strict=True)
        }
        prediction = evaluation.prediction.detach()
        params = {name: head.detach() for name, head in evaluation.params.items()}
        shift = (noise**2 / signal) * score
        if self.only_mean:
            shift = shift + self._recentred(prediction, params, sample, now)
        return Evaluation(self.scheduler.shifted_prediction(prediction, now, shift), params, {}, signals)

    def _log_likelihood(self, evaluation: Evaluation) -> Tensor:
        """Σ_i s_i Σ over the batch of log p_θ(x_i | z_t), in nats: a sample's gradient is its own."""
        heads = evaluation.params | evaluation.unseen
        return sum(
            scale * _log_likelihood(self.model.modalities[name], heads[name], self.values[name])
            for name, scale in self.conditioning.head_guidance.items()
        )

    def _recentred(self, prediction: Tensor, params: Mapping[str, Tensor], sample: Tensor, now: int) -> Tensor:
        """Correction for a network that does not see x_i: its implied z_0 minus the z_0 that the solver computes.

        The network predicts means over p_θ(x_i | z_t), also of c_t; the solver subtracts c_t of the observed x_i.
        """
        scheduler, known = self.scheduler, self.only_mean
        mean = {name: self.model.modalities[name].expected_encoding(params[name]) for name in known}
        signal, _ = scheduler.signal_and_noise(now)
        implied = scheduler.predict_original_sample(prediction, now, sample, mean)
        computed = scheduler.predict_original_sample(prediction, now, sample, known)
        moved = scheduler.aggregate(mean, now, sample) - scheduler.aggregate(known, now, sample)
        return implied - computed + moved / signal


def _log_likelihood(modality: Modality, params: Tensor, value: Tensor) -> Tensor:
    """Σ over the batch of log p_θ(x_i | z_t), in nats: a sample's gradient is its own."""
    return -modality.dimensions * modality.nll(params.float() if params.dtype != torch.float64 else params, value).sum()


def feedback_encoding(
    modality: Modality, encode: Callable[[Tensor], Tensor], params: Tensor, feedback: str, drawn: Tensor | None
) -> Tensor:
    """The encoding of an unobserved modality from its head: E(draw), Σ_k p(k) E(k), or E(mode); ``encode`` is E."""
    if feedback == "mean":
        return modality.expected_encoding(params)
    return encode(drawn if feedback == "draw" else modality.mode(params))
