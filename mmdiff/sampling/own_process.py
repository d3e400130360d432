"""Reverse processes of diffused modalities, Eq. (25): each has a solver of its own, which takes the head's mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmdiff.model import MTDiffusionModel
from mmdiff.observation import Noisy
from mmdiff.sampling.replacement import renoised
from mmdiff.sampling.request import Request
from mmdiff.schedulers import MTScheduler


class OwnProcesses:
    """z^i of several modalities, at one noise level.

    Args:
        model, scheduler: of the pipeline.
        request: of one batch of B samples.
        names: of the modalities.
        steps: of the solvers.
    """

    def __init__(
        self, model: MTDiffusionModel, scheduler: MTScheduler, request: Request, names: Iterable[str], steps: int
    ) -> None:
        self.model, self.request, self.names = model, request, sorted(names)
        # the solvers take the predicted signal itself; a signal has no bounds to clip it to
        config = {"prediction_type": "sample", "clip_sample": False}
        self.schedulers = {name: type(scheduler).from_config(scheduler.config, **config) for name in self.names}
        for own in self.schedulers.values():
            own.set_timesteps(steps, device=model.device, constant_encodings=True)
        self.times: list[Any] = next(iter(self.schedulers.values())).steps if self.names else []
        total, first = len(scheduler), scheduler.first_timestep
        self.shares = [
            torch.full((request.count,), (time + 1 - first) / total, device=model.device) for time in self.times
        ]
        self.noise, self.samples = request.noise(model), {}

    def start(self) -> None:
        """z^i_T."""
        self.samples = {name: self.noise(self.model.modalities[name].signal_shape) for name in self.names}

    def noisy(self, index: int) -> dict[str, Noisy]:
        """What the network sees at step ``index``."""
        return {name: Noisy(sample, self.shares[index]) for name, sample in self.samples.items()}

    def step(self, index: int, signals: Mapping[str, Tensor], back: int = 0) -> None:
        """One step of every solver, and ``back`` steps back by noise; ``signals`` are E[S_i(x_i)]."""
        generator = self.request.generator
        for name, own in self.schedulers.items():
            now, then = self.times[index], self.times[index + 1]
            sample = own.step(signals[name], now, self.samples[name], generator=generator, return_dict=False)[0]
            if back:
                noise = self.noise(tuple(sample.shape[1:]))
                sample = renoised(own, sample, then, self.times[index + 1 - back], {}, noise)
                own.rewind(back)
            self.samples[name] = sample

    def settled(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values at the end, from the heads of the last step."""
        modalities = self.model.modalities
        return {
            name: modalities[name].settled(params[name], self.noise(modalities[name].noise_shape))
            for name in self.names
        }
