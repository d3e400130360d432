"""diffusers' `UNet2DModel` with observation channels and state flags; pooled heads read its bottleneck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle

from mmdiff.backbones.attention import attention_layers
from mmdiff.backbones.base import Backbone, BackboneOutput, Observation, Widths
from mmdiff.errors import InputError
from mmdiff.slots import Axes, Axis, Slot, of, parts, slots

DEFAULT_CHANNELS = (64, 128, 256)
GRID_CHANNELS = 16
LARGEST = 2**16  # number of channels, groups or cells
CONTEXT_CHANNELS, CONTEXT_WIDTH = 8, 512


class UNet(Backbone):
    """A U-Net of ResNet blocks.

    Args:
        space, observation_channels, flag_widths: see `Backbone`.
        block_out_channels: channels of every resolution level, finest first.
        layers_per_block: ResNet blocks per level on the way down (one more on the way up).
        patch_size: p; the network works on p×p patches (pixel unshuffle in, pixel shuffle out): p² times fewer
            positions.
        attention: self-attention per level. Default: in the coarsest level only.
        attention_head_dim: channels per attention head.
        norm_num_groups: groups of the group norms; every level's channels are a multiple of it.
        dropout: in the ResNet blocks.
        pooled_grid: size g of a g×g grid on which vector heads read the bottleneck. 0: they read means over space. Set
            it, and `context_grid`, if a vector encodes a position.
        context_grid: size g of a g×g grid on which given vectors are written to the input. 0: they only join the time
            embedding.
        input_skip: add a learned multiple of z_t to the prediction, so that the network need not carry the noise of
            every pixel. The multiple depends on time and channel and starts at 0.
        time_scale_shift: "default" adds the time embedding, "scale_shift" also multiplies (ADM).
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
    """

    modality_parts = ("unet.conv_in.", "flags.", "place.", "grid.")

    def __init__(
        self,
        space: tuple[int, int, int],
        observation_channels: int,
        flag_widths: Sequence[int],
        block_out_channels: tuple[int, ...] | list[int] = DEFAULT_CHANNELS,
        layers_per_block: int = 2,
        patch_size: int = 1,
        attention: tuple[bool, ...] | list[bool] | None = None,
        attention_head_dim: int = 32,
        norm_num_groups: int = 8,
        dropout: float = 0.0,
        pooled_grid: int = 0,
        context_grid: int = 0,
        input_skip: bool = False,
        time_scale_shift: str = "default",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(space, observation_channels, flag_widths)
        _check_ranges(locals())
        channels, height, width = space
        levels = len(block_out_channels)
        attention = [False] * (levels - 1) + [True] if attention is None else list(attention)
        _check(space, block_out_channels, attention, norm_num_groups, attention_head_dim, patch_size)
        self.patch_size, self.channels, self.context_grid = patch_size, channels, context_grid
        self.multiple = patch_size * 2 ** (levels - 1)
        self.unet = UNet2DModel(
            sample_size=(height // patch_size, width // patch_size),
            in_channels=(channels + observation_channels) * patch_size**2 + (CONTEXT_CHANNELS if context_grid else 0),
            out_channels=channels * patch_size**2,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if on else "DownBlock2D" for on in attention),
            up_block_types=tuple("AttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attention)),
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            dropout=dropout,
            resnet_time_scale_shift=time_scale_shift,
        )
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.grid = None
        if pooled_grid:
            squeeze = nn.Conv2d(block_out_channels[-1], GRID_CHANNELS, 1)
            self.grid = nn.Sequential(squeeze, nn.AdaptiveAvgPool2d(pooled_grid), nn.Flatten())
        self.skip = nn.Linear(4 * block_out_channels[0], channels) if input_skip else None
        if self.skip is not None:
            nn.init.zeros_(self.skip.weight)
            nn.init.zeros_(self.skip.bias)
        width = 4 * block_out_channels[0]
        # two layers, for functions of vectors that are not linear; no biases, so that zeros add nothing
        self.flags = nn.Sequential(
            nn.Linear(sum(flag_widths), width, bias=False), nn.SiLU(), nn.Linear(width, width, bias=False)
        )
        self.place = place_layers(sum(flag_widths), context_grid, (space[1] // patch_size, space[2] // patch_size))
        nn.init.zeros_(self.unet.conv_out.weight)  # start from the prediction 0
        nn.init.zeros_(self.unet.conv_out.bias)

    @classmethod
    def widths(
        cls, block_out_channels: Any = DEFAULT_CHANNELS, patch_size: int = 1, pooled_grid: int = 0, **_: Any
    ) -> Widths:
        _check_ranges(locals())
        pooled = block_out_channels[-1] + block_out_channels[0] + GRID_CHANNELS * pooled_grid**2
        return Widths(block_out_channels[0], pooled, patch_size)

    def attention_layers(self) -> list[str]:
        return attention_layers(self)

    def slots(self, channels: Sequence[Slot], flags: Sequence[Slot]) -> dict[str, Axes]:
        """New inputs of the convolution and of the time embedding start at 0, so that they do not change the pretrained
        network. Those of `place` keep their random start: its layer norms have infinite gradients at zeros."""
        z_t = slots(("z_t", k) for k in range(self.channels))
        # with another number of channels of z_t no pretrained weight fits
        inputs = of(self.channels, parts([*z_t, *channels], self.patch_size**2))
        if self.place is None:
            place: dict[str, Axes] = {}
        else:
            inputs += slots(("place", self.context_grid, k) for k in range(CONTEXT_CHANNELS))
            place = {"place.0.weight": {1: Axis(flags)}}
        return {
            "unet.conv_in.weight": {1: Axis(inputs, zero=True)},
            "flags.0.weight": {1: Axis(flags, zero=True)},
            **place,
        }

    def blocks(self) -> Sequence[nn.Module]:
        return (*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks)

    def forward(self, sample: Tensor, timestep: Tensor, observation: Observation) -> BackboneOutput:
        unet = self.unet
        emb = unet.time_proj(timestep).to(sample.dtype)  # (B, c0)
        flags = observation.flags.to(sample.dtype)  # (B, V)
        emb = unet.time_embedding(emb) + self.flags(flags)  # (B, 4 c0)
        x = torch.cat([sample, observation.channels], dim=1)  # (B, C + O, H, W)
        h = pixel_unshuffle(x, self.patch_size)  # (B, (C + O) p², H / p, W / p)
        if self.place is not None:
            h = torch.cat([h, interpolate(self.place(flags), h.shape[2:], mode="nearest")], dim=1)  # + 8 channels
        h = unet.conv_in(h)  # (B, c0, H / p, W / p)
        skips = (h,)
        for block in unet.down_blocks:
            h, outputs = block(hidden_states=h, temb=emb)
            skips += outputs
        h = unet.mid_block(h, emb)  # (B, c_last, coarsest H, W)
        pooled = [h.mean(dim=(2, 3))]  # (B, c_last)
        if self.grid is not None:
            pooled.append(self.grid(h))  # (B, 16 g²)
        for block in unet.up_blocks:
            count = len(block.resnets)
            h, skips = block(h, skips[-count:], emb), skips[:-count]
        features = unet.conv_act(unet.conv_norm_out(h))  # (B, c0, H / p, W / p)
        pooled = torch.cat([*pooled, features.mean(dim=(2, 3))], dim=1)  # (B, P)
        prediction = pixel_shuffle(unet.conv_out(features), self.patch_size)  # (B, C, H, W)
        if self.skip is not None:
            prediction = prediction + self.skip(nn.functional.silu(emb))[:, :, None, None] * sample
        return BackboneOutput(prediction, features, pooled)


def place_layers(num_flags: int, grid: int, size: tuple[int, int]) -> nn.Module | None:
    """(B, num_flags) -> (B, 8, grid, grid), for cells of the patches. No layer has a bias, so zeros give 0."""
    if grid == 0:
        return None
    if grid < 0 or size[0] % grid or size[1] % grid:
        raise InputError("backbone.context_grid", grid, f"must divide {size[0]}x{size[1]} patches; 0 is off")
    layers: list[nn.Module] = []
    for before in (num_flags, CONTEXT_WIDTH):
        layers += [
            nn.Linear(before, CONTEXT_WIDTH, bias=False),
            nn.SiLU(),
            nn.LayerNorm(CONTEXT_WIDTH, elementwise_affine=False),
        ]
    return nn.Sequential(
        *layers,
        nn.Linear(CONTEXT_WIDTH, CONTEXT_CHANNELS * grid**2, bias=False),
        nn.Unflatten(1, (CONTEXT_CHANNELS, grid, grid)),
    )


_LEAST = {"layers_per_block": 1, "patch_size": 1, "attention_head_dim": 1, "norm_num_groups": 1}
_LEAST |= {"pooled_grid": 0, "context_grid": 0}


def _check_ranges(settings: Mapping[str, Any]) -> None:
    """Refuse settings that are out of range."""
    channels = settings["block_out_channels"]
    if not channels or min(channels) < 1:
        raise InputError("backbone.block_out_channels", channels, "needs one positive number per level, at least one")
    for name, least in _LEAST.items():
        if not least <= settings.get(name, least) <= LARGEST:
            raise InputError(f"backbone.{name}", settings[name], f"needs {least} … {LARGEST}")
    if max(channels) > LARGEST:
        raise InputError("backbone.block_out_channels", channels, f"needs numbers up to {LARGEST}")
    if not 0 <= settings.get("dropout", 0.0) < 1:
        raise InputError("backbone.dropout", settings["dropout"], "is a probability below 1")
    if settings.get("time_scale_shift", "default") not in ("default", "scale_shift"):
        raise InputError("backbone.time_scale_shift", settings["time_scale_shift"], "choose default or scale_shift")


def _check(space: tuple, channels: Any, attention: list[bool], groups: int, head_dim: int, patch: int) -> None:
    """Refuse settings that do not fit together."""
    key, factor = "backbone.block_out_channels", patch * 2 ** (len(channels) - 1)
    if patch < 1 or channels[0] % patch**2:
        raise InputError("backbone.patch_size", patch, f"its square must divide block_out_channels[0] = {channels[0]}")
    if space[1] % factor or space[2] % factor:
        raise InputError(key, list(channels), f"needs a size that is a multiple of {factor}, the data have {space[1:]}")
    if len(attention) != len(channels):
        raise InputError("backbone.attention", attention, f"needs {len(channels)} entries, one per level")
    for count, on in zip(channels, [*attention[:-1], True], strict=True):
        if count % groups:
            raise InputError(key, list(channels), f"every entry must be a multiple of norm_num_groups = {groups}")
        if on and count % head_dim:
            raise InputError(key, list(channels), f"attention needs a multiple of attention_head_dim = {head_dim}")
