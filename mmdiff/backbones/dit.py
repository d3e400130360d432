"""A diffusion transformer: patches, one token per modality and registers attend to one another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from mmdiff.backbones.base import Backbone, BackboneOutput, Observation, Widths
from mmdiff.backbones.transformer import FEED_FORWARD, Attention, Block, Rotation, modulated
from mmdiff.errors import InputError
from mmdiff.slots import Axes, Axis, Slot, of, parts, slots

#: Depth, width and heads of the published sizes (Peebles and Xie, 2023, arXiv 2212.09748).
PRESETS = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
LARGEST = 2**16
_FREQUENCIES = 256  # of the timestep


class DiT(Backbone):
    """A transformer of patches with adaLN-Zero (Peebles and Xie, 2023, arXiv 2212.09748).

    Every modality has a token: its learned name, plus what its flags and its context say; nothing if it is absent.
    Observations with a place in space are channels of the patches. Vector heads read the mean of the modalities' tokens
    and registers, and the mean of the patches.

    Args:
        space, observation_channels, flag_widths: see `Backbone`.
        preset: depth, width and heads: S (12, 384, 6), B (12, 768, 12), L (24, 1024, 16) or XL (28, 1152, 16).
        depth: number of blocks. Default: that of the preset.
        width: channels of a token. Default: that of the preset.
        heads: of the attention. Default: that of the preset.
        patch_size: p; a token is a patch of p×p positions of the diffusion space.
        registers: tokens that stand for nothing and may hold anything (Darcet et al., 2024, arXiv 2309.16588).
        mlp: the feed-forward layer, gelu or swiglu.
        mlp_ratio: its hidden width over ``width``.
        value_residual: attention mixes the first block's values in (arXiv 2410.17897).
        token_drop: share of patches that the middle blocks do not see in training; they see all patches in sampling
            (SPRINT, Park et al., 2025, arXiv 2510.21986). 0: off, and no layer is added.
        outer_blocks: with ``token_drop``: blocks before and after the middle, which see all patches.
        decoder_depth: blocks of a second transformer that denoises the patches, conditioned on the first's output at
            every patch (DDT, Wang et al., 2025, arXiv 2504.05741). 0: off.
        decoder_width: its channels. Default: 2 · width. Its heads are as wide as the first's.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
    """

    training_only: ClassVar[frozenset[str]] = frozenset({"gradient_checkpointing"})
    modality_parts = ("patches.", "decoder_patches.", "flags.", "names")

    def __init__(
        self,
        space: tuple[int, int, int],
        observation_channels: int,
        flag_widths: Sequence[int],
        preset: str = "S",
        depth: int | None = None,
        width: int | None = None,
        heads: int | None = None,
        patch_size: int = 2,
        registers: int = 4,
        mlp: str = "gelu",
        mlp_ratio: float = 4.0,
        value_residual: bool = False,
        token_drop: float = 0.0,
        outer_blocks: int = 2,
        decoder_depth: int = 0,
        decoder_width: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(space, observation_channels, flag_widths)
        depth, width, heads = _sizes(preset, depth, width, heads)
        _check(locals())
        self.channels, self.patch_size, self.multiple = space[0], patch_size, patch_size
        self.checkpointing, self.token_drop, self.flag_widths = gradient_checkpointing, token_drop, tuple(flag_widths)
        patch = (space[0] + observation_channels) * patch_size**2
        self.patches = nn.Linear(patch, width)
        self.names = nn.Parameter(0.02 * torch.randn(len(flag_widths), width))  # of the modalities
        self.registers = nn.Parameter(0.02 * torch.randn(registers, width))
        owners = [index for index, count in enumerate(flag_widths) for _ in range(count)]
        own = torch.arange(len(flag_widths))[:, None] == torch.tensor(owners)
        self.register_buffer("own", own, persistent=False)  # (modalities, V): which flags are whose
        # no biases, so that zeros add nothing
        self.flags = nn.Sequential(
            nn.Linear(sum(flag_widths), width, bias=False), nn.SiLU(), nn.Linear(width, width, bias=False)
        )
        self.frequencies = Timesteps(_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.times = TimestepEmbedding(_FREQUENCIES, width)
        self.unplaced = len(flag_widths) + registers
        self.rotation = Rotation(width // heads, self.unplaced)
        self.layers = nn.ModuleList(
            Block(width, heads, width, mlp, mlp_ratio, value_residual and index > 0) for index in range(depth)
        )
        self.outer = outer_blocks if token_drop else 0
        self.dropped = nn.Parameter(torch.zeros(width)) if token_drop else None  # in place of a token
        self.fuse = nn.Linear(2 * width, width) if token_drop else None
        self.value_residual = value_residual
        if decoder_depth:
            wide = decoder_width or 2 * width
            self.decoder_patches, self.to_decoder = nn.Linear(patch, wide), nn.Linear(width, wide)
            self.decoder_rotation = Rotation(width // heads, 0)
            wide_heads = wide // (width // heads)
            self.decoder = nn.ModuleList(Block(wide, wide_heads, wide, mlp, mlp_ratio) for _ in range(decoder_depth))
            width = wide
        else:
            self.decoder = nn.ModuleList()
        self.modulation, self.out = nn.Linear(width, 2 * width), nn.Linear(width, space[0] * patch_size**2)
        for layer in (self.modulation, self.out):  # start from the prediction 0
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def widths(
        cls,
        preset: str = "S",
        depth: int | None = None,
        width: int | None = None,
        heads: int | None = None,
        patch_size: int = 2,
        decoder_depth: int = 0,
        decoder_width: int | None = None,
        **_: Any,
    ) -> Widths:
        _, width, _ = _sizes(preset, depth, width, heads)
        features = (decoder_width or 2 * width) if decoder_depth else width
        if not 1 <= patch_size <= LARGEST or not 1 <= features <= LARGEST:
            key, value = ("patch_size", patch_size) if not 1 <= patch_size <= LARGEST else ("decoder_width", features)
            raise InputError(f"backbone.{key}", value, f"needs 1 … {LARGEST}")
        return Widths(features, 2 * width, patch_size)

    def slots(self, channels: Sequence[Slot], flags: Sequence[Slot]) -> dict[str, Axes]:
        """New inputs of the patches and flags start at 0. A modality's name goes with the first of its flags."""
        z_t = slots(("z_t", k) for k in range(self.channels))
        inputs = of(self.channels, parts([*z_t, *channels], self.patch_size**2))
        firsts = [sum(self.flag_widths[:index]) for index in range(len(self.flag_widths))]
        axes: dict[str, Axes] = {
            "patches.weight": {1: Axis(inputs, zero=True)},
            "flags.0.weight": {1: Axis(flags, zero=True)},
            "names": {0: Axis([flags[first] for first in firsts])},
        }
        return axes | ({"decoder_patches.weight": {1: Axis(inputs, zero=True)}} if self.decoder else {})

    def blocks(self) -> Sequence[nn.Module]:
        return (*self.layers, *self.decoder)

    def attention_layers(self) -> list[str]:
        blocks = [name for name, block in self.named_modules() if isinstance(block, Attention)]
        return [f"{name}.{layer}" for name in blocks for layer in ("qkv", "out")]

    def matrices(self) -> Sequence[nn.Parameter]:
        """Those of the blocks: embeddings and the last layer are not hidden, and are left to AdamW."""
        return [p for block in self.blocks() for p in block.parameters() if p.ndim == 2]

    def random_numbers(self, height: int, width: int) -> int:
        return height // self.patch_size * (width // self.patch_size) if self.token_drop else 0

    def forward(self, sample: Tensor, timestep: Tensor, observation: Observation) -> BackboneOutput:
        p, rows, columns = self.patch_size, sample.shape[2] // self.patch_size, sample.shape[3] // self.patch_size
        flags = observation.flags.to(sample.dtype)  # (B, V)
        times = self.times(self.frequencies(timestep).to(sample.dtype))  # (B, D)
        conditioning = silu(times + self.flags(flags))[:, None]  # (B, 1, D)
        x = torch.cat([sample, observation.channels], dim=1)
        # channels first, as a pixel unshuffle has them
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)  # (B, N, (C + O) p²)
        named = self.names + self.flags(flags[:, None] * self.own.to(flags.dtype))  # (B, modalities, D)
        tokens = torch.cat([named, self.registers.expand(len(x), -1, -1).to(named.dtype), self.patches(patches)], dim=1)
        turn = self.rotation(rows, columns, tokens.dtype)
        tokens = self._tokens(tokens, conditioning, turn, observation.random)  # (B, unplaced + N, D)
        front, inner = tokens[:, : self.unplaced], tokens[:, self.unplaced :]
        pooled = torch.cat([_normal(front).mean(dim=1), _normal(inner).mean(dim=1)], dim=1)  # (B, 2 D)
        if self.decoder:
            conditioning = silu(self.to_decoder(inner + times[:, None]))  # (B, N, D')
            turn = self.decoder_rotation(rows, columns, tokens.dtype)
            inner, _ = self._run(self.decoder, self.decoder_patches(patches), conditioning, turn, None)
        shift, scale = self.modulation(conditioning).chunk(2, dim=-1)
        h = modulated(inner, shift, scale)
        prediction = rearrange(self.out(h), "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=p, q=p)
        return BackboneOutput(prediction, rearrange(h, "b (h w) d -> b d h w", h=rows), pooled)

    def map_of(self, output: Any, height: int, width: int) -> Tensor:
        rows, columns = height // self.patch_size, width // self.patch_size
        return rearrange(output[0][:, self.unplaced :], "b (h w) d -> b d h w", h=rows, w=columns)

    def _tokens(self, tokens: Tensor, conditioning: Tensor, turn: Tensor, random: Tensor | None) -> Tensor:
        """All blocks. Those in the middle see the patches with the smallest random numbers, or all without any."""
        if self.fuse is None:
            return self._run(self.layers, tokens, conditioning, turn, None)[0]
        ends = self.outer, len(self.layers) - self.outer
        tokens, first = self._run(self.layers[: ends[0]], tokens, conditioning, turn, None)
        middle = self.layers[ends[0] : ends[1]]
        if random is None:
            inner, _ = self._run(middle, tokens, conditioning, turn, first)
        else:
            kept = self._kept(random)  # (B, L')
            row = torch.arange(len(kept), device=kept.device)[:, None]
            turns, values = turn.expand(len(kept), -1, -1, -1)[row, kept], None if first is None else first[row, kept]
            seen, _ = self._run(middle, tokens[row, kept], conditioning, turns, values)
            empty = self.dropped.to(tokens.dtype).expand_as(tokens)
            inner = empty.scatter(1, kept[..., None].expand_as(seen), seen.to(tokens.dtype))
        fused = self.fuse(torch.cat([tokens, inner], dim=2))
        return self._run(self.layers[ends[1] :], fused, conditioning, turn, first)[0]

    def _run(
        self, blocks: Iterable[nn.Module], tokens: Tensor, conditioning: Tensor, turn: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(tokens, values of the very first block, if the others mix them in)."""
        for block in blocks:
            if self.checkpointing and torch.is_grad_enabled():  # no block draws numbers; autocast is kept
                tokens, value = checkpoint(
                    block, tokens, conditioning, turn, first, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens, value = block(tokens, conditioning, turn, first)
            first = value if self.value_residual and first is None else first
        return tokens, first

    def _kept(self, random: Tensor) -> Tensor:
        """Places of the tokens that the middle blocks see: those without a place, and patches by their numbers."""
        count = max(1, round((1 - self.token_drop) * random.shape[1]))
        patches = random.argsort(dim=1)[:, :count] + self.unplaced
        front = torch.arange(self.unplaced, device=random.device).expand(len(random), -1)
        return torch.cat([front, patches], dim=1)


def _normal(tokens: Tensor) -> Tensor:
    zero = tokens.new_zeros(())
    return modulated(tokens, zero, zero)


def _sizes(preset: Any, depth: int | None, width: int | None, heads: int | None) -> tuple[int, int, int]:
    if preset not in PRESETS:
        raise InputError("backbone.preset", preset, f"choose one of {', '.join(PRESETS)}")
    sizes = [own if own is not None else size for own, size in zip((depth, width, heads), PRESETS[preset], strict=True)]
    for name, size in zip(("depth", "width", "heads"), sizes, strict=True):
        if not 1 <= size <= LARGEST:
            raise InputError(f"backbone.{name}", size, f"needs 1 … {LARGEST}")
    return sizes[0], sizes[1], sizes[2]


def _check(settings: dict[str, Any]) -> None:
    """Refuse settings that are out of range or do not fit together."""
    space, depth, width, heads = (settings[name] for name in ("space", "depth", "width", "heads"))
    head_dim, patch = width // heads, settings["patch_size"]
    decoder = settings["decoder_width"] or 2 * width
    drop, outer = settings["token_drop"], settings["outer_blocks"]
    rules = {
        "heads": (
            heads,
            width % heads == 0 and head_dim > 0 and head_dim % 4 == 0,
            f"width = {width} needs heads of 4, 8, 12 … channels",
        ),
        "patch_size": (
            patch,
            1 <= patch <= LARGEST and space[1] % patch == space[2] % patch == 0,
            f"must divide the diffusion space, {space[1:]}",
        ),
        "registers": (settings["registers"], 0 <= settings["registers"] <= LARGEST, f"needs 0 … {LARGEST}"),
        "mlp": (settings["mlp"], settings["mlp"] in FEED_FORWARD, f"choose one of {', '.join(FEED_FORWARD)}"),
        "mlp_ratio": (settings["mlp_ratio"], 0 < settings["mlp_ratio"] <= 64, "needs a number up to 64 above 0"),
        "token_drop": (drop, 0 <= drop < 1, "is a share below 1"),
        "outer_blocks": (
            outer,
            not drop or (outer >= 1 and 2 * outer < depth),
            f"needs 1 or more, and a block of depth = {depth} in the middle",
        ),
        "decoder_depth": (settings["decoder_depth"], 0 <= settings["decoder_depth"] <= LARGEST, f"needs 0 … {LARGEST}"),
        "decoder_width": (decoder, decoder % max(1, head_dim) == 0, f"needs a multiple of {head_dim}, as heads have"),
    }
    for name, (value, fine, remedy) in rules.items():
        if not fine:
            raise InputError(f"backbone.{name}", value, remedy)
