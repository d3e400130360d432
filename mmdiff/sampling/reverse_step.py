"""One reverse step: heads -> encodings -> the solver's step on u = z − c, with c added at the next timestep."""

from __future__ import annotations

from torch import Tensor

from mmdiff.model import MTDiffusionModel
from mmdiff.sampling.guidance import Denoiser, feedback_encoding
from mmdiff.sampling.replacement import renoised, replaced, visits
from mmdiff.sampling.request import Request
from mmdiff.schedulers import MTScheduler


class ReverseStep:
    """z_t -> z at the solver's next timestep; values that stay the same in all steps are computed once.

    Args:
        model, scheduler: of the pipeline; the scheduler's timesteps are set here.
        request: of one batch of B samples.

    Attributes:
        schedule: [(index of a step, number of steps to go back after it)], in the order of the calls.
        draws: {unobserved modality: (B, …)}, drawn from the heads in the last step.
    """

    def __init__(self, model: MTDiffusionModel, scheduler: MTScheduler, request: Request) -> None:
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
        self.noise = request.noise(model)
        self.draws: dict[str, Tensor] = {}
        self.encodings = model.encode({name: values[name] for name in sorted(conditioning.aggregated)})
        self.denoiser = Denoiser(model, scheduler, values, conditioning, dict(self.encodings), request.count)

    def start(self) -> Tensor:
        """z_T (B, C, H, W)."""
        return self._with_known(self.noise(self.model.space), self.times[0])

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
        evaluation = self.denoiser(sample, self.timesteps[index], now, heads)
        self._feed_back(evaluation.params, last)
        sample = self.scheduler.step(
            evaluation.prediction, now, sample, self.encodings, generator=self.request.generator, return_dict=False
        )[0]
        sample = self._with_known(sample, then)
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
        }
        for name in self.fed_back:
            modality, drawn = modalities[name], self.draws.get(name)
            self.encodings[name] = feedback_encoding(modality, self.encoders[name], params[name], feedback, drawn)

    def _with_known(self, sample: Tensor, now: int) -> Tensor:
        if not self.known:
            return sample
        return replaced(self.scheduler, sample, now, self.known, self.encodings, self.noise(self.model.space))
