"""Tiny networks that many tests start from: with random weights, and one that knows its law exactly."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmdiff.backbones import Backbone, BackboneOutput, Observation
from mmdiff.model import MTDiffusionModel
from mmdiff.schedulers import MTDiffusionScheduler

Module = TypeVar("Module", bound=nn.Module)
DIT = {"depth": 2, "width": 16, "heads": 2, "patch_size": 2, "registers": 1}
LAYERS = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}

DIFFUSERS_UNET = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
DIFFUSERS_DIT = {
    "sample_size": 8,
    "in_channels": 3,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_embeds_ada_norm": 10,
}


def alive(module: Module, std: float = 0.1) -> Module:
    """With random numbers where a fresh network has zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=std)
    return module.eval()


def random_model(
    modalities: dict[str, dict[str, Any]], seed: int = 0, std: float = 0.1, **arguments: Any
) -> MTDiffusionModel:
    """A U-Net of two levels around these modalities, the same for the same seed."""
    torch.manual_seed(seed)
    backbone = {"kind": "unet", **LAYERS}
    return alive(MTDiffusionModel(modality_config=modalities, backbone_config=backbone, **arguments), std)


# ----------------------------------------------------------------------------------------- an exact Gaussian, float64

RHO, SCALE, KNOWN = 0.8, 0.5, 0.6  # correlation and standard deviation of two pixels, and the value of the known one
COVARIANCE = SCALE**2 * torch.tensor([[1, RHO], [RHO, 1]], dtype=torch.float64)


class ExactGaussian(Backbone):
    """What an exact network predicts of z_0 ~ N(0, Σ) on two pixels."""

    def __init__(self, scheduler: MTDiffusionScheduler) -> None:
        nn.Module.__init__(self)
        self.precision = nn.Parameter(torch.zeros((), dtype=torch.float64))  # a model computes in its weights'
        self.scheduler = scheduler

    def noise(self, sample: Tensor, timestep: int) -> Tensor:
        """E[ε | z_t] = σ Cov(z_t)⁻¹ z_t."""
        a_bar = self.scheduler.alphas_cumprod[timestep]
        noisy = a_bar * COVARIANCE + (1 - a_bar) * torch.eye(2, dtype=torch.float64)
        return ((1 - a_bar).sqrt() * torch.linalg.solve(noisy, sample.reshape(-1, 2).T)).T.reshape(sample.shape)

    def forward(self, sample: Tensor, timestep: Tensor, observation: Observation) -> BackboneOutput:
        signal = self.scheduler.alphas_cumprod[timestep[0]].sqrt()
        sigma, noise = (1 - signal**2).sqrt(), self.noise(sample, int(timestep[0]))
        z_0 = (sample - sigma * noise) / signal
        said = {"epsilon": noise, "sample": z_0, "v_prediction": signal * noise - sigma * z_0}
        prediction = said[self.scheduler.config.prediction_type]
        return BackboneOutput(prediction, sample.new_zeros(len(sample), 8, 1, 2), sample.new_zeros(len(sample), 16))

    @classmethod
    def widths(cls, **settings: Any) -> Any:
        raise NotImplementedError


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Numbers to 1e-4 of their size, class ids in 99 of 100."""
    assert one.keys() == other.keys()
    for name, values in one.items():
        if values.is_floating_point():
            torch.testing.assert_close(other[name], values, rtol=1e-4, atol=1e-4, msg=name)
        else:
            assert float((other[name] == values).double().mean()) >= 0.99, name
