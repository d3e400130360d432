"""Networks (sample, timestep, observation) -> prediction, features, pooled. One file each, one line here."""

from typing import Any

from mmdiff.backbones.base import Backbone, BackboneOutput, Observation, Widths
from mmdiff.backbones.diffusers_dit import DiffusersDiT
from mmdiff.backbones.diffusers_unet import DiffusersUNet
from mmdiff.backbones.dit import DiT
from mmdiff.backbones.networks import NetworkBackbone, complete_config
from mmdiff.backbones.unet import UNet
from mmdiff.errors import InputError

BACKBONES: dict[str, type[Backbone]] = {
    "unet": UNet,
    "dit": DiT,
    "diffusers_unet": DiffusersUNet,
    "diffusers_dit": DiffusersDiT,
}


def find_backbone(kind: Any) -> type[Backbone]:
    """The class of a kind.

    Raises:
        InputError: for an unknown kind.
    """
    if not isinstance(kind, str) or kind not in BACKBONES:
        raise InputError("backbone.kind", kind, f"choose one of {', '.join(sorted(BACKBONES))}")
    return BACKBONES[kind]


__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneOutput",
    "DiT",
    "DiffusersDiT",
    "DiffusersUNet",
    "NetworkBackbone",
    "Observation",
    "UNet",
    "Widths",
    "complete_config",
    "find_backbone",
]
