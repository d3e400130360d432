"""The config of an experiment: a pydantic model for every section; unknown keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import field_validator

from mmdiff.config.base import Strict, folder_name
from mmdiff.config.data import DataConfig
from mmdiff.config.evaluation import EvaluateConfig, SampleConfig
from mmdiff.config.model import BackboneConfig, ModalityConfig, SchedulerConfig
from mmdiff.config.training import LossConfig, StatesConfig, TrainConfig

TRACKERS = ("none", "tensorboard", "wandb")


class Config(Strict):
    """One experiment."""

    name: str  # of the experiment
    output: str | None = None  # run folder; default: runs/<name>
    data: DataConfig
    anchor: str = "image"  # the modality that is diffused
    modalities: dict[str, ModalityConfig]
    backbone: BackboneConfig = BackboneConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    states: StatesConfig = StatesConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    # where metrics are sent beside metrics.jsonl: none, wandb, tensorboard, or a list of them
    track: str | list[str] = "none"

    @field_validator("track", mode="before")
    @classmethod
    def _known_trackers(cls, value: Any) -> Any:
        names = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str) and name in TRACKERS for name in names) or not names:
            raise ValueError(f"choose none, {', '.join(TRACKERS[1:])}, or a list of them")
        return value

    @field_validator("name")
    @classmethod
    def _folder_name(cls, name: str) -> str:
        return folder_name(name)

    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output or f"runs/{self.name}")

    def column(self, modality: str) -> str:
        """The data column of a modality."""
        return self.data.columns.get(modality, modality)

    def trackers(self) -> list[str]:
        """The names in `track`, each once, sorted."""
        return sorted(({self.track} if isinstance(self.track, str) else set(self.track)) - {"none"})

    def auxiliary(self) -> list[str]:
        """Names of all modalities but the anchor, sorted."""
        return sorted(set(self.modalities) - {self.anchor})
