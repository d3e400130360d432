"""One training step: states → encodings → z_t → backbone → the terms. Read this file first.

Everything random is a function of (seed, step, position in the global batch), and every term is divided by the full
batch, so that one process, several processes and accumulation compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdiff import losses
from mmdiff.alignment import Alignment
from mmdiff.data import Batch
from mmdiff.model import MTDiffusionModel
from mmdiff.observation import Noisy
from mmdiff.own_times import Flags, OwnTimes, draw_own_times, noisy_signals
from mmdiff.randomness import normal, uniform, uniform_number, uniforms
from mmdiff.schedulers import MTScheduler
from mmdiff.schedulers.weights import initial_parameters
from mmdiff.states import COLUMNS, DISTRIBUTIONS, Draw, StateProbabilities, streams


class BatchPosition(NamedTuple):
    """Where in the run a (micro-)batch stands: what its random numbers are functions of."""

    step: int
    positions: Tensor  # (B,) int64, in the global batch
    global_batch: int

    def neighbours(self) -> Tensor:
        """(B,) index of each row's neighbour: positions 2k and 2k + 1 of the global batch are a pair.

        A part of an even number of rows cuts no pair, so that parts and processes agree. The order of rows is drawn
        anew in every epoch, and so are the pairs.
        """
        order = self.positions.argsort()
        return order[torch.searchsorted(self.positions[order], self.positions ^ 1)]


class ObjectiveOutput(NamedTuple):
    """``loss`` to differentiate, ``terms`` by name, detached, and the ``parts`` whose sum is the loss, with their
    weights and gradients; all means over the batch."""

    loss: Tensor
    terms: dict[str, Tensor]
    parts: dict[str, Tensor]


class MTObjective(nn.Module):
    """L1 + L3 + Σ_i λ_i L2_i + L0 for one batch, and what `loss` adds.

    Args:
        model, scheduler: what is trained, and the forward process.
        state_probabilities: {modality: StateProbabilities}, the anchor included (its ``aggregated`` counts as 0).
        loss_weights: {auxiliary modality with a head: λ_i}.
        distribution: how the states of all modalities are drawn together, one of `mmdiff.states.DISTRIBUTIONS`.
        terminal_weight: coefficient of L0.
        equal_time, own_time: probabilities of the times of diffused modalities, see `mmdiff.states.draw_times`.
        anchor_hidden: probability that the anchor is hidden (unless it is observed): nothing is denoised, and the
            heads learn to read from what else is observed in one evaluation.
        min_snr_gamma: cap of the SNR weight of L1, or None for the plain error.
        uncertainty: L1 and L3 as the likelihood of a Gaussian whose σ the network tells, one number per sample.
        learn_scale: auxiliary modalities with a learned schedule whose scale is learned too.
        learn_weights: train the weight of every modality, 1 of the anchor and λ_i of the others, from there on.
        contrastive: λ of contrastive flow matching; 0: off.
        alignment: of the backbone's features with a frozen encoder's, or None.
        seed: of the run.
    """

    def __init__(
        self,
        model: MTDiffusionModel,
        scheduler: MTScheduler,
        state_probabilities: Mapping[str, StateProbabilities],
        loss_weights: Mapping[str, float],
        distribution: str = "independent",
        terminal_weight: float = 1.0,
        anchor_hidden: float = 0.0,
        equal_time: float = 0.3,
        own_time: float = 0.6,
        min_snr_gamma: float | None = None,
        uncertainty: bool = False,
        learn_scale: tuple[str, ...] = (),
        learn_weights: bool = False,
        contrastive: float = 0.0,
        alignment: Alignment | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.scheduler = model, scheduler
        self.loss_weights, self.distribution = dict(loss_weights), DISTRIBUTIONS[distribution]
        self.anchor_index = model.names.index(model.anchor)
        probabilities = torch.tensor([state_probabilities[name] for name in model.names])  # (N, 2)
        probabilities[self.anchor_index, 0] = 0.0
        self.register_buffer("state_probabilities", probabilities, persistent=False)
        self.terminal_weight, self.min_snr_gamma, self.seed = terminal_weight, min_snr_gamma, seed
        self.anchor_hidden, self.time_probabilities = anchor_hidden, (equal_time, own_time)
        self.log_std = nn.Linear(model.pooled_width, 1) if uncertainty else None
        if self.log_std is not None:
            nn.init.zeros_(self.log_std.weight)  # start from σ = 1
            nn.init.zeros_(self.log_std.bias)
        self.contrastive, self.alignment = contrastive, alignment
        trained = [model.anchor, *(name for name, weight in self.loss_weights.items() if weight > 0)]
        self.log_weights = nn.ParameterDict({n: nn.Parameter(torch.zeros(1)) for n in trained if learn_weights})
        weights = scheduler.config.weights or {}
        learned = [n for n, w in weights.items() if w.get("schedule") == "learned"]
        # a weight of 0 at every t takes nothing into c_t
        self.weighted = tuple(n for n in sorted(weights) if n in learned or bool(scheduler.cumulative_weights(n).any()))
        self.unweighted = tuple(sorted(set(weights) - set(self.weighted)))
        self._placeholders: dict[tuple[Any, ...], Tensor] = {}
        self.schedule_shapes = nn.ParameterDict({name: initial_parameters() for name in learned})
        self.schedule_scales = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(()), requires_grad=name in learn_scale) for name in learned}
        )

    @property
    def needs_pairs(self) -> bool:
        """Whether a term asks for a row's neighbour, so that parts must have an even number of rows."""
        return self.contrastive > 0 or (self.alignment is not None and self.alignment.shuffled)

    def learned_weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{modality: (parameters, log_scale)} of learned weight schedules."""
        return {name: (self.schedule_shapes[name], self.schedule_scales[name]) for name in self.schedule_shapes}

    def forward(self, batch: Batch, position: BatchPosition) -> ObjectiveOutput:
        """One (micro-)batch; see the module's docstring."""
        model = self.model.of_size(*batch.values[self.model.anchor].shape[-2:])
        scheduler = self.scheduler.with_learned_weights(self.learned_weights())
        batch = self.without_missing(batch, model)
        aggregated, observed, denoised = self.draw_states(batch, position)
        timesteps = self.draw_timesteps(position, denoised)  # (B,)
        noisy: dict[str, Noisy] = {}
        if model.gains:
            drawn = self.draw_own_times((aggregated, observed, denoised), batch, position, timesteps)
            aggregated, observed = drawn.aggregated, drawn.observed
            noisy = noisy_signals(model, scheduler, batch.values, drawn, self.seed, position.step, position.positions)

        anchor = batch.values[model.anchor]
        stored = batch.values.get(f"{model.anchor}/latents")
        model.modalities[model.anchor].prepare(anchor, self.normals("latent", position), stored)
        z_0 = model.modalities[model.anchor].encode(anchor)  # (B, C, H, W)
        noise = normal(self.seed, position.step, "noise", position.positions, z_0.shape[1:])
        weighted = {name: batch.values[name] for name in self.weighted}
        encodings = {
            name: encoding * aggregated[name][:, None, None, None] for name, encoding in model.encode(weighted).items()
        }
        z_t = scheduler.add_noise(z_0, noise, timesteps, encodings)
        z_t = z_t * denoised[:, None, None, None]  # elsewhere the mean of z_T, as in sampling
        observation = model.observation(batch.values, aggregated, observed, like=z_t, noisy=noisy)
        if count := model.backbone.random_numbers(*z_t.shape[2:]):
            numbers = uniform(self.seed, position.step, "backbone", position.positions, (count,))
            observation = observation._replace(random=numbers)
        output = model(z_t, timesteps, observation)

        target, weight = scheduler.training_target(z_0, noise, timesteps), self.snr_weight(timesteps)
        error = losses.denoising_error(output.prediction, target, weight)  # (B,)
        if self.log_std is not None:
            error = losses.uncertain_error(error, self.log_std(output.pooled)[:, 0])
        error = error * denoised
        terminal = losses.terminal_kl(
            scheduler.marginal(z_0, timesteps.new_full((len(z_0),), scheduler.terminal_timestep), encodings)
        )
        first = timesteps <= scheduler.first_timestep  # t ≤ 1
        terms = {"l0": terminal / z_0[0].numel(), "l1": error * ~first, "l3": error * first}
        for name in model.generated:
            modality = model.modalities[name]
            source, asked = name, batch.values[name]
            if name in model.filling:
                source, asked = model.anchor, modality.target(asked, anchor)
            nll = modality.nll(output.params[name].float(), asked)
            terms[f"l2/{name}"] = nll * (batch.present[name] & batch.present[source] & ~observed[source])
        if self.contrastive:
            other = position.neighbours()
            push = losses.contrastive_error(output.prediction, target[other], weight)
            terms["contrastive"] = push * (denoised & batch.present[model.anchor][other])
        if self.alignment is not None:
            terms |= self.alignment(anchor, z_t.shape[2:], denoised, position.step, position.neighbours)
        return self.total(terms, self.untouched(batch, model))

    def untouched(self, batch: Batch, model: MTDiffusionModel) -> Tensor | float:
        """0, as a function of the encoders that take no part in c_t.

        Their weights belong to the model: in a graph they get the gradient 0, which DDP waits for and weight decay
        needs. One row is enough.
        """
        rows = {name: batch.values[name][:1] for name in self.unweighted}
        return sum(0.0 * encoding.sum() for encoding in model.encode(rows).values())

    def normals(self, stream: str, position: BatchPosition) -> Callable[[tuple[int, ...]], Tensor]:
        """shape -> standard normal numbers (B, *shape) of a stream."""
        return lambda shape: normal(self.seed, position.step, stream, position.positions, shape)

    def without_missing(self, batch: Batch, model: MTDiffusionModel) -> Batch:
        """Missing values as placeholders: whatever a data set left there has no effect."""
        values = {}
        for name, value in batch.values.items():
            present = batch.present[name.partition("/")[0]].reshape(-1, *(1,) * (value.ndim - 1))
            # an anchor that comes as latents alone has no channels
            whole = value.numel() > 0
            values[name] = torch.where(present, value, self._placeholder(name, value, model)) if whole else value
        return Batch(values, batch.present)

    def _placeholder(self, name: str, like: Tensor, model: MTDiffusionModel) -> Tensor:
        """Kept: to send one to an accelerator would wait for it in every step."""
        key = name, like.shape, like.device, like.dtype
        if key not in self._placeholders:
            modality = model.modalities[name.partition("/")[0]]
            missing = modality.blank(len(like), like.device) if "/" in name else modality.placeholder()
            self._placeholders[key] = missing.to(like)
        return self._placeholders[key]

    def total(self, terms: dict[str, Tensor], nothing: Tensor | float = 0.0) -> ObjectiveOutput:
        """The weighted sum of the terms, plus ``nothing``, 0; the only place where (B,) becomes a number."""
        means = {name: term.mean() for name, term in terms.items()}
        weights, penalties = self.trained_weights()
        own = weights.get(self.model.anchor, 1.0)
        parts = {"l0": self.terminal_weight * means["l0"].float(), "l1": own * means["l1"], "l3": own * means["l3"]}
        parts |= {f"l2/{n}": weights.get(n, fixed) * means[f"l2/{n}"] for n, fixed in self.loss_weights.items()}
        if "contrastive" in means:
            parts["contrastive"] = -self.contrastive * own * means["contrastive"]
        if "repa" in means:
            parts["repa"] = self.alignment.weight * means["repa"]
        parts |= {f"penalty/{name}": penalty for name, penalty in penalties.items()}
        loss = sum(list(parts.values())[1:], start=parts["l0"]) + nothing
        logged = {"loss": loss, **means, **{f"weight/{name}": weight for name, weight in weights.items()}}
        return ObjectiveOutput(loss, {name: value.detach() for name, value in logged.items()}, parts)

    def trained_weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """({modality: w}, {modality: −½ log w}) of learned weights."""
        fixed = {self.model.anchor: 1.0, **self.loss_weights}
        both = {name: losses.learned_weight(p, fixed[name]) for name, p in self.log_weights.items()}
        return {name: weight for name, (weight, _) in both.items()}, {name: rest for name, (_, rest) in both.items()}

    def draw_states(self, batch: Batch, position: BatchPosition) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """({name: aggregated}, {name: observed}, denoised), (B,) bool each; a missing value is absent.

        Nothing is denoised where the anchor is observed, missing or hidden: the heads are read at t = T, nothing is
        aggregated, and L1 and L3 count 0.
        """
        names, anchor = self.model.names, self.anchor_index
        drawn = [*streams(names), "hidden"]
        u = uniforms(self.seed, position.step, drawn, position.positions, (COLUMNS,))  # (N + 3, B, 3)
        flags = self.distribution.draw(Draw(u[:-1], self.state_probabilities, anchor))
        present = torch.stack([batch.present[name] for name in names])  # (N, B)
        observed = flags.observed & present
        denoised = present[anchor] & ~observed[anchor] & (u[-1, :, 0] >= self.anchor_hidden)  # (B,)
        aggregated = flags.aggregated & present & denoised
        return dict(zip(names, aggregated, strict=True)), dict(zip(names, observed, strict=True)), denoised

    def draw_own_times(
        self, states: tuple[Flags, Flags, Tensor], batch: Batch, position: BatchPosition, timesteps: Tensor
    ) -> OwnTimes:
        """The times of diffused modalities, and the ``states`` of `draw_states` that they change."""
        names, counter = sorted(self.model.gains), (self.seed, position.step, position.positions)
        given = batch.present, timesteps, self.time_probabilities
        return draw_own_times(self.scheduler, names, states, *given, *counter)

    def draw_timesteps(self, position: BatchPosition, denoised: Tensor) -> Tensor:
        """(B,): one uniform number, spread evenly over the global batch (Kingma et al., 2021), mapped by the scheduler.

        Where nothing is denoised t = T, as sampling asks then.
        """
        offset = uniform_number(self.seed, position.step, "times")
        u = (position.positions.double() / position.global_batch + offset) % 1.0
        return torch.where(denoised, self.scheduler.training_timesteps(u), self.scheduler.terminal_timestep)

    def snr_weight(self, timesteps: Tensor) -> Tensor | None:
        """(B,) weight of the denoising error, or None."""
        if self.min_snr_gamma is None:
            return None
        snr, kind = self.scheduler.snr(timesteps), self.scheduler.config.prediction_type
        return losses.min_snr_weight(snr, self.min_snr_gamma, kind).float()
