"""The model: modalities around one backbone. Saved as safetensors + JSON, like any diffusers model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from mmdiff.backbones import BACKBONES, Observation
from mmdiff.errors import InputError
from mmdiff.modalities import MODALITIES, Modality, Shape


@dataclass
class MTDiffusionModelOutput(BaseOutput):
    """``prediction`` (B, C, H, W) of u_t; ``params`` {auxiliary modality: parameters of p_θ(x_i | z_t)}."""

    prediction: Tensor
    params: dict[str, Tensor]


class MTDiffusionModel(ModelMixin, ConfigMixin):
    """Encoders, one backbone and decoder heads.

    Args:
        modality_config: {name: {"kind": one of MODALITIES, …constructor arguments}}.
        backbone_config: {"kind": one of BACKBONES, …constructor arguments}.
        anchor: the modality x_0 that is diffused; its encoder fixes the diffusion space.
    """

    @register_to_config
    def __init__(
        self, modality_config: dict[str, dict[str, Any]], backbone_config: dict[str, Any], anchor: str = "image"
    ) -> None:
        super().__init__()
        if anchor not in modality_config:
            raise InputError("anchor", anchor, f"is no modality; choose one of {', '.join(sorted(modality_config))}")
        backbone, backbone_settings = _kind(BACKBONES, "backbone", backbone_config)
        kinds = {
            name: _kind(MODALITIES, f"modalities.{name}", modality_config[name]) for name in sorted(modality_config)
        }
        anchor_class, anchor_settings = kinds[anchor]
        space = anchor_class.space(**anchor_settings)
        if space is None:
            raise InputError("anchor", anchor, "cannot be diffused itself; choose an image modality")
        shape = Shape(space, *backbone.widths(**backbone_settings))
        self.anchor = anchor
        self.names = tuple(kinds)  # sorted: nothing depends on the order of a dict in a file
        self.auxiliary = tuple(name for name in self.names if name != anchor)
        self.modalities = nn.ModuleDict()
        for name, (modality, settings) in kinds.items():
            self.modalities[_checked_name(name)] = modality(
                shape, **{**settings, "head": False} if name == anchor else settings
            )
        observed = sum(modality.observation_channels for modality in self.modalities.values())
        self.backbone = backbone(space, observed, 2 * len(self.names), **backbone_settings)
        self.space = space

    def encode(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name: E_i(x_i)}, (B, C, H, W) each."""
        return {name: self.modalities[name].encode(value) for name, value in values.items()}

    def observation(
        self,
        values: Mapping[str, Tensor],
        aggregated: Mapping[str, Tensor],
        observed: Mapping[str, Tensor],
        like: Tensor,
    ) -> Observation:
        """The backbone's second input, from the states of all modalities.

        Args:
            values: values of at least the observed modalities.
            aggregated, observed: {name: (B,) bool}; a missing name means nowhere.
            like: a tensor (B, C, H, W) whose device, dtype and size count.
        """
        nowhere = torch.zeros(len(like), dtype=torch.bool, device=like.device)
        channels, flags = [], []
        for name in self.names:
            modality: Modality = self.modalities[name]
            seen = observed.get(name, nowhere)
            flags += [aggregated.get(name, nowhere), seen]
            if name in values and name in observed:
                channels.append(modality.observe(values[name]).to(like.dtype) * seen[:, None, None, None])
            else:
                channels.append(like.new_zeros(len(like), modality.observation_channels, *like.shape[2:]))
        return Observation(torch.cat(channels, dim=1), torch.stack(flags, dim=1).to(like.dtype))

    def forward(self, sample: Tensor, timestep: Tensor, observation: Observation) -> MTDiffusionModelOutput:
        """One evaluation at z_t = ``sample`` (B, C, H, W), ``timestep`` (B,) in 0 … T − 1."""
        output = self.backbone(sample, timestep, observation)
        params = {name: self.modalities[name].decode(output.features, output.pooled) for name in self.auxiliary}
        return MTDiffusionModelOutput(prediction=output.prediction, params=params)


def _kind(table: Mapping[str, type], key: str, config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class that a config entry names, and its own settings."""
    if config.get("kind") not in table:
        raise InputError(f"{key}.kind", config.get("kind"), f"choose one of {', '.join(sorted(table))}")
    return table[config["kind"]], {name: value for name, value in config.items() if name != "kind"}


def _checked_name(name: str) -> str:
    """Modality names are attributes, file names and config keys."""
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise InputError("modalities", name, "a modality's name must be an identifier that nn.ModuleDict can hold")
    return name
