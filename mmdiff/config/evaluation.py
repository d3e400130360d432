"""Sampling and evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from mmdiff.config.base import FolderName, Scale, Seed, Strict
from mmdiff.config.data import MaskingConfig


class SampleConfig(Strict):
    """Sampling of grids and evaluations."""

    steps: int = Field(20, ge=1, le=100_000)  # solver steps
    guidance_scale: float = Field(1.0, ge=0, le=1e4)  # classifier-free, of observed modalities; 1 is off
    guidance: dict[str, Scale] = {}  # {modality: scale}, over guidance_scale
    # of unknown aggregated modalities; none: as fits the solver
    feedback: Literal["draw", "mean", "mode"] | None = None
    # of diffused modalities: after the anchor, or at its noise level; default: anchor_first
    order: Literal["anchor_first", "together"] | None = None
    # how modalities are read from the anchor: by their heads, or by their own process; default: denoise where diffused
    read: Literal["mode", "draw", "denoise"] | None = None
    read_steps: int | None = Field(None, ge=1, le=100_000)  # solver steps of such a process; default: steps
    batch_size: int = Field(256, ge=1, le=10**7)  # samples that are computed at once

    def phases(self) -> dict[str, Any]:
        """Arguments of the pipeline for diffused modalities."""
        return {"order": self.order, "read": self.read, "read_steps": self.read_steps}

    def scales(self, observed: Iterable[str]) -> dict[str, float]:
        """{observed modality: guidance scale}."""
        return {name: self.guidance.get(name, self.guidance_scale) for name in observed}


class LpipsConfig(Strict):
    """The perceptual distance."""

    net: Literal["alex", "vgg", "squeeze"] = "alex"  # network of the distance
    backbone: str | None = None  # a local state dict of the network, instead of torchvision's weights
    heads: str | None = None  # a local state dict of the linear heads, instead of those in the package


class ZeroShotConfig(Strict):
    """CLIP zero-shot classification by open_clip."""

    model: str = "ViT-B-32"  # name of the model in open_clip
    pretrained: str | None = "laion2b_s34b_b79k"  # tag of its weights, or a local checkpoint
    names: list[str] | None = None  # of the classes; default: those of the data
    template: str = "a photo of a {}."  # text for a class; {} is its name


class EvaluateConfig(Strict):
    """What `mmdiff evaluate` measures."""

    num_samples: int = Field(749, ge=2, le=10**8)  # samples per direction
    seeds: list[Seed] = Field([0], min_length=1)  # one evaluation each
    at_end: bool = True  # evaluate when training ends
    max_rows: int = Field(20_000, ge=2, le=10**9)  # real rows that judges and features use
    judges: dict[str, str] = {}  # {modality: run folder of a separately trained model that reads it from images}
    # of FID and KID: pixels, inception, or a SqueezeNet file; auto: inception if its weights are here
    features: str = "auto"
    lpips: LpipsConfig = LpipsConfig()
    zero_shot: ZeroShotConfig | None = None  # a CLIP baseline for labels
    masking: dict[FolderName, MaskingConfig] = {}  # {name: holes} of masked images; default: that of data.masking
