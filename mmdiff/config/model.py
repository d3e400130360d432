"""Modalities, the network and the scheduler."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mmdiff.config.base import Open, Strict


class WeightConfig(Strict):
    """W_t of a modality (docs/theory.md, section 3)."""

    schedule: Literal["constant", "bump", "early", "none", "learned"] = "constant"  # how W_t depends on t
    scale: float = Field(1.5, ge=0, le=1e4)  # max_t W_t
    learn_scale: bool = False  # train the scale too; only with schedule learned


class ModalityStates(Strict):
    """A modality's probabilities, which replace those of `states`."""

    aggregated: float | None = Field(None, ge=0, le=1)  # probability of the flag
    observed: float | None = Field(None, ge=0, le=1)  # probability of the flag


class ModalityConfig(Open):
    """One data type; further keys belong to its class."""

    kind: str  # a built-in modality, or an import path: my_pkg.depth:Depth
    weight: WeightConfig | None = None  # default: WeightConfig(); schedule none if never aggregated, or diffused
    loss_weight: float = Field(0.1, ge=0, le=1e6)  # λ_i, coefficient of the L2 term
    states: ModalityStates = ModalityStates()
    # give the modality a noise level and a reverse process of its own, so that draws of it are whole: for mask, dense,
    # image, embedding and vector, whose value the rest leaves open (docs/theory.md, section 9)
    diffused: bool = False
    gain: float = Field(1.0, gt=0, le=1e4)  # factor of a diffused modality's signal; below 1, noise hides it sooner


class BackboneConfig(Open):
    """The network; further keys belong to its class."""

    kind: str = "unet"  # the network
    # its weights: a UNet2DModel or DiTTransformer2DModel of diffusers (folder or hub name, alone or in a pipeline), or
    # a pipeline, run or checkpoint of mmdiff; scheduler settings that are left out become those of the source
    initialize_from: str | None = None


class SchedulerConfig(Open):
    """The path from data to noise; further keys are arguments of the class that `kind` names."""

    kind: str = "diffusion"  # diffusion, or flow_match
    num_train_timesteps: int = Field(1000, ge=2, le=100_000)  # T
    # clip the predicted z_0; default: if the anchor's encodings are bounded (pixels, not latents)
    clip_sample: bool | None = None
    clip_sample_range: float = Field(1.0, gt=0, le=1e4)  # to ± this value
    solver: str = "DPMSolverMultistepScheduler"  # class of diffusers that takes the steps
    solver_config: dict[str, Any] | None = None  # its own options, such as eta of DDIM
