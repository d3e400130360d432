"""Any `UNet2DModel` of diffusers, with observations and flags added through layers that start at zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mmdiff.backbones.base import BackboneOutput, Observation, Widths
from mmdiff.backbones.networks import KEY, NetworkBackbone, complete_config, flag_layers, zero_conv
from mmdiff.backbones.unet import CONTEXT_CHANNELS, GRID_CHANNELS, place_layers
from mmdiff.errors import InputError
from mmdiff.slots import Axes, Axis, Slot, slots


class DiffusersUNet(NetworkBackbone):
    """A `UNet2DModel`: `initialize_from` writes its config and reads its weights.

    Args:
        space, observation_channels, flag_widths: see `Backbone`.
        network: the config of the `UNet2DModel`.
        class_label: of a class-conditional network, the class that stands for all.
        pooled_grid, context_grid: as of `UNet`.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
    """

    network_class: ClassVar = UNet2DModel
    stands_for: ClassVar = ("unet",)

    def __init__(
        self,
        space: tuple[int, int, int],
        observation_channels: int,
        flag_widths: Sequence[int],
        network: dict[str, Any],
        class_label: int | None = None,
        pooled_grid: int = 0,
        context_grid: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(space, observation_channels, flag_widths, network)
        config = self.network.config
        _check_label(self.network, class_label)
        levels = len(config.block_out_channels)
        self.multiple = 2 ** (levels - 1)
        if space[1] % 2 ** (levels - 1) or space[2] % 2 ** (levels - 1):
            remedy = f"its {levels} levels need sizes that are multiples of {2 ** (levels - 1)}"
            raise InputError(KEY, list(space[1:]), remedy)
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self.label: Tensor | None  # () int64
        self.register_buffer("label", None if class_label is None else torch.tensor(class_label), persistent=False)
        self.grid = None
        if pooled_grid:
            squeeze = nn.Conv2d(config.block_out_channels[-1], GRID_CHANNELS, 1)
            self.grid = nn.Sequential(squeeze, nn.AdaptiveAvgPool2d(pooled_grid), nn.Flatten())
        self.context_grid = context_grid
        self.flags = flag_layers(sum(flag_widths), self.network.time_embedding.linear_2.out_features)
        self.place = place_layers(sum(flag_widths), context_grid, (space[1], space[2]))
        inputs = observation_channels + (CONTEXT_CHANNELS if context_grid else 0)
        self.observe = zero_conv(inputs, config.block_out_channels[0], 3)

    @classmethod
    def widths(cls, network: Any = None, pooled_grid: int = 0, **_: Any) -> Widths:
        channels = complete_config(cls.network_class, network)["block_out_channels"]
        if not isinstance(channels, list) or not channels or not all(isinstance(count, int) for count in channels):
            raise InputError(f"{KEY}.block_out_channels", channels, "needs one number per level")
        return Widths(channels[0], channels[-1] + channels[0] + GRID_CHANNELS * pooled_grid**2, 1)

    def slots(self, channels: Sequence[Slot], flags: Sequence[Slot]) -> dict[str, Axes]:
        axes: dict[str, Axes] = {"flags.0.weight": {1: Axis(flags, zero=True)}}
        inputs = list(channels)
        if self.place is not None:
            inputs += slots(("place", self.context_grid, k) for k in range(CONTEXT_CHANNELS))
            axes["place.0.weight"] = {1: Axis(flags)}
        return axes | ({} if self.observe is None else {"observe.weight": {1: Axis(inputs, zero=True)}})

    def blocks(self) -> Sequence[nn.Module]:
        unet = self.network
        return tuple(block for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) if block is not None)

    def forward(self, sample: Tensor, timestep: Tensor, observation: Observation) -> BackboneOutput:
        unet, flags = self.network, observation.flags.to(sample.dtype)  # (B, V)
        image = 2 * sample - 1.0 if unet.config.center_input_sample else sample
        emb = unet.time_embedding(unet.time_proj(timestep).to(sample.dtype))  # (B, D)
        if unet.class_embedding is not None:
            emb = emb + self._class_embedding(emb)
        emb = emb + self.flags(flags)
        h = unet.conv_in(image)  # (B, c0, H, W)
        seen = observation.channels  # (B, O, H, W)
        if self.place is not None:
            places = interpolate(self.place(flags), seen.shape[2:], mode="nearest")
            seen = torch.cat([seen, places], dim=1)  # + 8 channels
        if self.observe is not None:
            h = h + self.observe(seen)
        bottleneck, features, added = through_blocks(unet, h, emb, image)
        pooled = [bottleneck.mean(dim=(2, 3))]  # (B, c_last)
        if self.grid is not None:
            pooled.append(self.grid(bottleneck))  # (B, 16 g²)
        prediction = unet.conv_out(features)
        prediction = prediction if added is None else prediction + added
        if unet.config.time_embedding_type == "fourier":
            prediction = prediction / timestep.reshape(-1, 1, 1, 1)
        pooled = torch.cat([*pooled, features.mean(dim=(2, 3))], dim=1)  # (B, P)
        return BackboneOutput(prediction[:, : self.channels].to(sample.dtype), features, pooled)

    def alone(self, network: UNet2DModel, sample: Tensor, timestep: Tensor) -> Tensor:
        classes = None if self.label is None else self.label.expand(len(sample))
        if network.config.class_embed_type == "identity":
            classes = sample.new_zeros(len(sample), network.time_embedding.linear_2.out_features)
        return network(sample, timestep, class_labels=classes).sample[:, : self.channels]

    def _class_embedding(self, emb: Tensor) -> Tensor:
        """Of `class_label`, (B, D); a network that takes embeddings gets zeros."""
        unet = self.network
        if unet.config.class_embed_type == "identity":
            return torch.zeros_like(emb)
        labels = self.label.expand(len(emb))  # (B,)
        if unet.config.class_embed_type == "timestep":
            return unet.class_embedding(unet.time_proj(labels).to(emb.dtype))
        return unet.class_embedding(labels)


def through_blocks(unet: UNet2DModel, h: Tensor, emb: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """A U-Net between its first and last convolution, as `UNet2DModel.forward` runs it.

    Args:
        unet: the network.
        h: (B, c0, H, W), behind the first convolution.
        emb: (B, D), the time embedding.
        image: (B, C, H, W), which skip blocks carry through the levels.

    Returns:
        The bottleneck (B, c_last, coarsest H, W); the features (B, c0, H, W) that the last convolution reads; what skip
        blocks add to the prediction, or None.
    """
    skips: tuple[Tensor, ...] = (h,)
    for block in unet.down_blocks:
        if hasattr(block, "skip_conv"):
            h, outputs, image = block(hidden_states=h, temb=emb, skip_sample=image)
        else:
            h, outputs = block(hidden_states=h, temb=emb)
        skips += outputs
    if unet.mid_block is not None:
        h = unet.mid_block(h, emb)
    bottleneck, added = h, None
    for block in unet.up_blocks:
        count = len(block.resnets)
        here, skips = skips[-count:], skips[:-count]
        if hasattr(block, "skip_conv"):
            h, added = block(h, here, emb, added)
        else:
            h = block(h, here, emb)
    return bottleneck, unet.conv_act(unet.conv_norm_out(h)), added


def _check_label(unet: UNet2DModel, label: int | None) -> None:
    """A class-conditional network needs a class that stands for all."""
    config, key = unet.config, "backbone.class_label"
    if unet.class_embedding is None or config.class_embed_type == "identity":
        if label is not None:
            raise InputError(key, label, "the network takes no class; leave it out")
    elif label is None:
        remedy = "the network is class-conditional; set the class (its null class, if it has one) that stands for all"
        raise InputError(key, None, remedy)
    elif not 0 <= label < (config.num_class_embeds or config.num_train_timesteps or 2**16):
        raise InputError(key, label, f"the network knows 0 … {(config.num_class_embeds or 2**16) - 1}")
