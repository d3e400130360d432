"""Networks (sample, timestep, observation) -> prediction, features, pooled. One file each, one line here."""

from mmdiff.backbones.base import Backbone, BackboneOutput, Observation, Widths
from mmdiff.backbones.unet import UNet

BACKBONES: dict[str, type[Backbone]] = {"unet": UNet}

__all__ = ["BACKBONES", "Backbone", "BackboneOutput", "Observation", "UNet", "Widths"]
