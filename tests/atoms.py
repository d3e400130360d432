"""A network that knows its law: four atoms of an anchor and a mask whose pixels must agree, and a label of each."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmdiff.backbones import Backbone, BackboneOutput, Observation
from mmdiff.model import MTDiffusionModel
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.schedulers import MTScheduler

ANCHORS = torch.tensor([-1, -1, 1, 1], dtype=torch.float64)  # the value of all pixels
MASKS = torch.tensor([[0, 0], [1, 1], [0, 0], [1, 1]])  # the first row of pixels; the second is 0
LABELS = torch.tensor([0, 1, 1, 1])
PRIOR = torch.tensor([0.4, 0.25, 0.2, 0.15], dtype=torch.float64)
GAIN = 1.5
SIZE = {"channels": 1, "size": 2}
FAR = 1e6  # precision of a value that is observed


def masks() -> Tensor:
    """The masks of the atoms, (4, 2, 2)."""
    return torch.stack([MASKS, torch.zeros_like(MASKS)], dim=1)


class ExactAtoms(Backbone):
    """What an exact network predicts of z_0, and the logits of the mask's pixels, whatever it is shown."""

    def __init__(self, scheduler: MTScheduler, modalities: nn.ModuleDict) -> None:
        nn.Module.__init__(self)
        self.precision = nn.Parameter(torch.zeros((), dtype=torch.float64))  # a model computes in its weights'
        self.scheduler, self.labels = scheduler, modalities["label"].encode(LABELS).double().detach()
        self.signals = GAIN * modalities["mask"].signal(masks()).double()

    def _level(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *(1,) * (like.ndim - 1))
        return tuple(self.scheduler._at(key, timestep, timestep).reshape(shape) for key in ("signal", "noise"))

    def forward(self, sample: Tensor, timestep: Tensor, observation: Observation) -> BackboneOutput:
        anchor, label, signal = observation.channels.split([1, 1, 2], dim=1)
        flags, times = observation.flags[:, :6].double(), observation.flags[:, 6:22]  # image, label, mask: two each
        anchors = ANCHORS[:, None, None, None].expand(-1, 1, 2, 2)
        weight = self.scheduler._at("W/label", timestep, sample) * flags[:, 2, None, None, None]
        s, sigma = self._level(timestep, sample)
        logits = PRIOR.log() - distance(label, self.labels) * flags[:, 3:4] * FAR
        seen = flags[:, 1:2]
        logits = logits - distance(anchor, anchors) * seen * FAR
        logits = logits - distance((sample - weight * label) / sigma, anchors, s / sigma) * (1 - seen)
        share = torch.atan2(times[:, 8], times[:, 0]) / math.pi
        timesteps = share * len(self.scheduler) - 1 + self.scheduler.first_timestep
        s, sigma = self._level(timesteps.round() if self.scheduler.first_timestep == 0 else timesteps, signal)
        moving = (times != 0).any(dim=1, keepdim=True) & (flags[:, 5:6] == 0)
        noisy = distance(signal / sigma.clamp(min=1e-9), self.signals, s / sigma.clamp(min=1e-9))
        logits = logits - torch.where(moving, noisy, distance(signal, self.signals) * flags[:, 5:6] * FAR)
        posterior = logits.softmax(dim=1)  # (B, 4)
        shares = torch.einsum("bk,kchw->bchw", posterior, self.signals / GAIN)
        prediction = (posterior @ ANCHORS)[:, None, None, None].expand_as(sample)
        return BackboneOutput(prediction, shares.clamp(min=1e-300).log(), sample.new_zeros(len(sample), 16))

    @classmethod
    def widths(cls, **settings: Any) -> Any:
        raise NotImplementedError


def distance(point: Tensor, atoms: Tensor, scale: Tensor | None = None) -> Tensor:
    """½ ‖point − scale · atom‖² of every atom: (B, K)."""
    scaled = atoms[None] if scale is None else scale[:, None] * atoms
    return (point[:, None] - scaled).square().flatten(2).sum(dim=2) / 2


def exact_pipeline(scheduler: type[MTScheduler], **config: Any) -> MTDiffusionPipeline:
    """The mask is diffused; ``config`` of the scheduler."""
    torch.manual_seed(0)
    modalities = {
        "image": {"kind": "image", **SIZE},
        "label": {"kind": "label", "num_classes": 2},
        "mask": {"kind": "mask", "num_classes": 2, "size": 2},
    }
    layers = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    model = MTDiffusionModel(modalities, {"kind": "unet", **layers}, diffused={"mask": GAIN}).double().eval()
    config = {"weights": {"label": {"schedule": "bump", "scale": 0.5}}} | config
    path = scheduler(prediction_type="sample", clip_sample=False, **config)
    model.backbone = ExactAtoms(path, model.modalities)
    model.modalities["mask"].head = nn.Identity()
    pipeline = MTDiffusionPipeline(model=model, scheduler=path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def shares(samples: dict[str, Tensor]) -> Tensor:
    """How often each atom was drawn, and last how often none of them: (5,)."""
    positive = samples["image"].mean(dim=(1, 2, 3)) > 0
    row = samples["mask"][:, 0]
    atom = 2 * positive.long() + row[:, 0]
    atom[(row[:, 0] != row[:, 1]) | samples["mask"][:, 1].any(dim=1)] = 4
    return torch.bincount(atom, minlength=5).double() / len(atom)


def variation(found: Tensor, prior: Tensor) -> float:
    """Total variation distance to the atoms' law."""
    return float((found - torch.cat([prior, prior.new_zeros(1)])).abs().sum() / 2)
