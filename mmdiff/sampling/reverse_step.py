"""One reverse step: heads -> encodings -> the solver's step on u = z − c, with c added at the next timestep."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mmdiff.model import MTDiffusionModel
from mmdiff.sampling.guidance import Denoiser, feedback_encoding
from mmdiff.sampling.own_process import OwnProcesses
from mmdiff.sampling.replacement import renoised, replaced, visits
from mmdiff.sampling.request import Request
from mmdiff.schedulers import MTScheduler


class ReverseStep:
    """z_t -> z at the solver's next timestep; values that stay the same in all steps are computed once.

    Args:
        model, scheduler: of the pipeline; the scheduler's timesteps are set here.
        request: of one batch of B samples.
        names: diffused modalities that are denoised beside the anchor, at its noise level.

    Attributes:
        schedule: [(index of a step, number of steps to go back after it)], in the order of the calls.
        draws: {unobserved modality: (B, …)}, drawn from the heads in the last step; of ``names`` their values.
    """

    def __init__(
        self, model: MTDiffusionModel, scheduler: MTScheduler, request: Request, names: Iterable[str] = ()
    ) -> None:
        conditioning, values = request.conditioning, request.values
        self.model, self.scheduler, self.request = model, scheduler, request
        self.fed_back = sorted(conditioning.fed_back)
        self.encoders = {name: model.modalities[name].fixed_encoder() for name in self.fed_back}
        self.unobserved = sorted(set(model.generated) - set(values))
        anchor = model.modalities[model.anchor]
        self.known = [model.modalities[n].known_part(values[n], anchor) for n in sorted(conditioning.replaced)]
        constant = not (self.fed_back or self.known)
        scheduler.set_timesteps(request.steps, device=model.device, constant_encodings=constant)
        self.times = scheduler.steps
        self.timesteps = [t.expand(request.count) for t in scheduler.timesteps]
        self.schedule = visits(request.steps, *(conditioning.resampling if self.known else (1, 1)))
        self.own = OwnProcesses(model, scheduler, request, names, request.steps)
        self.noise = request.noise(model)
        self.draws: dict[str, Tensor] = {}
        self.encodings = model.encode({name: values[name] for name in sorted(conditioning.aggregated)})
        self.denoiser = Denoiser(model, scheduler, values, conditioning, dict(self.encodings), request.count)

    def start(self, noise: Tensor | None = None) -> Tensor:
        """z_T (B, C, H, W), of this noise or new one."""
        sample = self._with_known(self.noise(self.model.space) if noise is None else noise, self.times[0])
        self.own.start()
        return sample

    def __call__(self, sample: Tensor, index: int, back: int = 0) -> Tensor:
        """One step.

        Args:
            sample: z_t (B, C, H, W).
            index: of the step.
            back: steps to go back afterwards, by noise.

        Returns:
            z (B, C, H, W) at the timestep of step ``index + 1 − back``.
        """
        now, then = self.times[index], self.times[index + 1]
        last = index == self.request.steps - 1
        heads = {*self.fed_back, *self.unobserved} if last else self.fed_back
        evaluation = self.denoiser(sample, self.timesteps[index], now, heads, self.own.noisy(index))
        self._feed_back(evaluation.params, last)
        sample = self.scheduler.step(
            evaluation.prediction, now, sample, self.encodings, generator=self.request.generator, return_dict=False
        )[0]
        sample = self._with_known(sample, then)
        self.own.step(index, evaluation.signals, back)
        if back:
            noise = self.noise(self.model.space)
            sample = renoised(self.scheduler, sample, then, self.times[index + 1 - back], self.encodings, noise)
            self.scheduler.rewind(back)
        return sample

    def _feed_back(self, params: dict[str, Tensor], last: bool) -> None:
        """Encodings of unobserved modalities from their heads; in the last step also draws of all of them."""
        feedback, modalities = self.request.feedback, self.model.modalities
        self.draws = {
            name: modalities[name].sample(params[name], self.noise(modalities[name].noise_shape))
            for name in (self.unobserved if last else self.fed_back if feedback == "draw" else ())
            if name not in self.own.names
        } | (self.own.settled(params) if last else {})
        for name in self.fed_back:
            modality, drawn = modalities[name], self.draws.get(name)
            self.encodings[name] = feedback_encoding(modality, self.encoders[name], params[name], feedback, drawn)

    def _with_known(self, sample: Tensor, now: int) -> Tensor:
        if not self.known:
            return sample
        return replaced(self.scheduler, sample, now, self.known, self.encodings, self.noise(self.model.space))


class OwnStep:
    """One step of diffused modalities while the anchor stands still: it is known, or has not begun.

    Args:
        model, scheduler: of the pipeline.
        request: of one batch; where its values hold the anchor, it is shown as the heads are used to it.
        names: of the modalities that are denoised.

    Attributes:
        draws: {modality of ``names``: its values (B, …)} after the last step.
    """

    def __init__(self, model: MTDiffusionModel, scheduler: MTScheduler, request: Request, names: Iterable[str]) -> None:
        self.model, self.scheduler, self.request = model, scheduler, request
        self.noise, self.known = request.noise(model), model.anchor in request.values
        self.now = scheduler.terminal_timestep
        self.own = OwnProcesses(model, scheduler, request, names, request.phases.read_steps)
        self.denoiser = Denoiser(model, scheduler, request.values, request.conditioning, {}, request.count)
        self.draws: dict[str, Tensor] = {}

    def start(self, noise: Tensor | None = None) -> Tensor:
        """What stands in place of z_t: zeros where the network observes the anchor, the anchor where it cannot, z_T
        where it has not begun."""
        if not self.known:
            sample = self.noise(self.model.space) if noise is None else noise
        elif self.request.levels is None:
            sample = torch.zeros_like(self.denoiser.like)
        else:
            z_0 = self.model.modalities[self.model.anchor].encode(self.request.values[self.model.anchor])
            self.now = self.request.levels[0]
            sample = self.scheduler.add_noise(z_0, self.noise(self.model.space), self._timesteps())
        self.own.start()
        return sample

    def _timesteps(self) -> Tensor:
        return torch.full((self.request.count,), self.now, device=self.model.device)

    def __call__(self, sample: Tensor, index: int, back: int = 0) -> Tensor:
        """Arguments as of `ReverseStep`; the sample stays."""
        evaluation = self.denoiser(sample, self._timesteps(), self.now, (), self.own.noisy(index))
        if index == self.request.phases.read_steps - 1:
            self.draws = self.own.settled(evaluation.params)
        self.own.step(index, evaluation.signals)
        return sample
