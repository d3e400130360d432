"""The phases of a call, one after the other: what one phase draws is a condition of the next."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mmdiff.model import MTDiffusionModel
from mmdiff.sampling.replacement import visits
from mmdiff.sampling.request import Request
from mmdiff.sampling.reverse_step import OwnStep, ReverseStep
from mmdiff.schedulers import MTScheduler


class Run:
    """Everything that one batch denoises.

    Args:
        model, scheduler: of the pipeline.
        request: of the batch.

    Attributes:
        steps: arguments of the calls, in their order: (phase, index of the step, number of steps to go back after it).
        values: {modality: (B, …)}, given or drawn so far.
        draws: {unobserved modality: (B, …)}, drawn from the heads in the anchor's last step.
    """

    def __init__(self, model: MTDiffusionModel, scheduler: MTScheduler, request: Request) -> None:
        self.model, self.scheduler, self.request = model, scheduler, request
        self.values, self.draws = dict(request.values), {}
        self.steps = [
            (phase, index, back) for phase in range(len(request.phases.names)) for index, back in self._visits(phase)
        ]
        self.phase, self.z_t = -1, None
        if self.steps:
            self._begin(0)

    def __call__(self, phase: int, index: int, back: int) -> None:
        """One step."""
        if phase != self.phase:
            self._begin(phase)
        self.z_t = self.step(self.z_t, index, back)
        if index == self._count(phase) - 1 and not back:
            self._end()

    def _is_anchors(self, phase: int) -> bool:
        return self.model.anchor in self.request.phases.names[phase]

    def _count(self, phase: int) -> int:
        return self.request.steps if self._is_anchors(phase) else self.request.phases.read_steps

    def _visits(self, phase: int) -> list[tuple[int, int]]:
        chosen = self.request.conditioning
        jumps = chosen.resampling if chosen.replaced and self._is_anchors(phase) else (1, 1)
        return visits(self._count(phase), *jumps)

    def _begin(self, phase: int) -> None:
        """The phase's request has the values so far; a drawn one is observed."""
        self.phase, anchor = phase, self.model.anchor
        names, chosen = self.request.phases.names[phase] - {anchor}, self.request.conditioning
        drawn = frozenset(self.values) - set(self.request.values) - {anchor}
        chosen = replace(chosen, concatenated=chosen.concatenated | drawn)
        if not self._is_anchors(phase):
            chosen = replace(chosen, head_guidance={}, fed_back=frozenset(), replaced=frozenset())
        if anchor in self.values:
            shown = {anchor} if self.request.levels is None else set()
            chosen = replace(chosen, aggregated=frozenset(), concatenated=chosen.concatenated | shown)
        request = replace(self.request, values=self.values, conditioning=chosen)
        kind = ReverseStep if self._is_anchors(phase) else OwnStep
        self.step = kind(self.model, self.scheduler, request, names)
        self.z_t = self.step.start(self.z_t)

    def _end(self) -> None:
        names, model = self.request.phases.names[self.phase], self.model
        self.values = self.values | {name: self.step.draws[name] for name in names - {model.anchor}}
        if model.anchor in names:
            self.draws = self.step.draws
            self.values[model.anchor] = pasted(model, self.request, model.modalities[model.anchor].unencode(self.z_t))


def pasted(model: MTDiffusionModel, request: Request, anchor: Tensor) -> Tensor:
    """The anchor with the pixels that observed values fix, if the request wants them."""
    for name in model.filling if request.paste_back else ():
        if name in request.values:
            anchor = model.modalities[name].paste(anchor, request.values[name])
    return anchor
