"""A finished run as the reconstruction benchmark sees it: its pipeline, and what it was trained for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mmdiff.build import state_probabilities
from mmdiff.config import Config
from mmdiff.modalities import MaskedImage
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.schedulers import MTDiffusionScheduler


@dataclass(frozen=True)
class Trained:
    """A finished run; ``name`` stands in tables, ``folder`` holds what was trained."""

    name: str
    config: Config
    pipeline: MTDiffusionPipeline
    folder: Path

    @cached_property
    def digest(self) -> str:
        """Of every file of the pipeline: another training, solver or schedule is another digest."""
        digest = hashlib.sha256()
        for path in sorted((self.folder / "pipeline").rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    @property
    def masked(self) -> str | None:
        """The name of its masked image."""
        modalities = self.pipeline.model.modalities
        return next((n for n in self.pipeline.model.auxiliary if isinstance(modalities[n], MaskedImage)), None)

    @property
    def observed(self) -> float:
        """How often training observed the masked image."""
        return state_probabilities(self.config, self.masked).observed if self.masked else 0.0

    @property
    def denoises(self) -> bool:
        """Whether training ever denoised the anchor."""
        return (
            self.config.states.anchor_hidden < 1 and state_probabilities(self.config, self.config.anchor).observed < 1
        )

    @property
    def has_head(self) -> bool:
        """Whether training read the anchor from the masked image in one evaluation."""
        weighted = self.masked is not None and self.config.modalities[self.masked].loss_weight > 0
        return weighted and self.observed > 0 and self.config.states.anchor_hidden > 0

    @property
    def is_plain(self) -> bool:
        """Whether it is an ordinary diffusion of pixels, without a masked image."""
        pipeline = self.pipeline
        variance_preserving = isinstance(pipeline.scheduler, MTDiffusionScheduler)
        return self.masked is None and self.denoises and variance_preserving and pipeline.autoencoder is None

    @contextmanager
    def counting(self) -> Iterator[list[int]]:
        """Within the context a list grows by the batch of every evaluation of the backbone."""
        batches: list[int] = []
        backbone = self.pipeline.model.backbone
        hook = backbone.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
        try:
            yield batches
        finally:
            hook.remove()
