"""diffusers' `DiTTransformer2DModel`, with observations and flags added through layers that start at zero.

DiT: Peebles and Xie (2023), "Scalable Diffusion Models with Transformers", arXiv 2212.09748.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiTTransformer2DModel
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from mmdiff.backbones.base import BackboneOutput, Observation, Widths
from mmdiff.backbones.networks import KEY, NetworkBackbone, complete_config, flag_layers, zero_conv
from mmdiff.errors import InputError
from mmdiff.slots import Axes, Axis, Slot


class DiffusersDiT(NetworkBackbone):
    """A `DiTTransformer2DModel`: `initialize_from` writes its config and reads its weights.

    Args:
        space, observation_channels, flag_widths: see `Backbone`.
        network: the config of the `DiTTransformer2DModel`.
        class_label: the class that stands for all; by default the null class.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
    """

    network_class: ClassVar = DiTTransformer2DModel
    stands_for: ClassVar = ("dit",)

    def __init__(
        self,
        space: tuple[int, int, int],
        observation_channels: int,
        flag_widths: Sequence[int],
        network: dict[str, Any],
        class_label: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(space, observation_channels, flag_widths, network)
        config, self.checkpointing = self.network.config, gradient_checkpointing
        self.patch_size, width = config.patch_size, self.network.inner_dim
        self.multiple = self.patch_size
        if space[1] % self.patch_size or space[2] % self.patch_size:
            raise InputError(f"{KEY}.patch_size", self.patch_size, f"must divide the diffusion space, {space[1:]}")
        null = config.num_embeds_ada_norm
        label = null if class_label is None else class_label
        if not 0 <= label <= null:
            raise InputError("backbone.class_label", label, f"the network knows 0 … {null - 1}, and {null} for none")
        self.register_buffer("label", torch.tensor(label), persistent=False)
        self.flags = flag_layers(sum(flag_widths), width)
        self.observe = zero_conv(observation_channels, width, self.patch_size, self.patch_size)

    @classmethod
    def widths(cls, network: Any = None, **_: Any) -> Widths:
        config = complete_config(cls.network_class, network)
        sizes = [config[name] for name in ("num_attention_heads", "attention_head_dim", "patch_size")]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise InputError(KEY, sizes, "needs whole numbers of heads, of channels per head and of a patch's side")
        return Widths(sizes[0] * sizes[1], sizes[0] * sizes[1], sizes[2])

    def slots(self, channels: Sequence[Slot], flags: Sequence[Slot]) -> dict[str, Axes]:
        axes: dict[str, Axes] = {"flags.0.weight": {1: Axis(flags, zero=True)}}
        return axes | ({} if self.observe is None else {"observe.weight": {1: Axis(list(channels), zero=True)}})

    def blocks(self) -> Sequence[nn.Module]:
        return [part for block in self.network.transformer_blocks for part in (block.attn1, block.ff)]

    def forward(self, sample: Tensor, timestep: Tensor, observation: Observation) -> BackboneOutput:
        dit, rows = self.network, sample.shape[2] // self.patch_size
        added = self.flags(observation.flags.to(sample.dtype))  # (B, D)
        h = dit.pos_embed(sample)  # (B, N, D)
        if self.observe is not None:
            h = h + rearrange(self.observe(observation.channels), "b d h w -> b (h w) d")
        for block in dit.transformer_blocks:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(self._block, block, h, timestep, added, use_reentrant=False)
            else:
                h = self._block(block, h, timestep, added)
        emb = self._conditioning(dit.transformer_blocks[0].norm1.emb, timestep, added)
        shift, scale = dit.proj_out_1(silu(emb)).chunk(2, dim=1)  # (B, D) each
        h = dit.norm_out(h) * (1 + scale[:, None]) + shift[:, None]
        prediction = rearrange(
            dit.proj_out_2(h),
            "b (h w) (p q c) -> b c (h p) (w q)",
            h=rows,
            p=self.patch_size,
            q=self.patch_size,
        )
        features = rearrange(h, "b (h w) d -> b d h w", h=rows)
        return BackboneOutput(prediction[:, : self.channels], features, h.mean(dim=1))

    def alone(self, network: DiTTransformer2DModel, sample: Tensor, timestep: Tensor) -> Tensor:
        return network(sample, timestep, self.label.expand(len(sample))).sample[:, : self.channels]

    def examples(self, device: torch.device) -> tuple[Tensor, Tensor, Observation]:
        """Squares: diffusers puts patches together to nothing else."""
        sample, timestep, seen = super().examples(device)
        side = min(sample.shape[2:])
        return sample[:, :, :side, :side], timestep, seen._replace(channels=seen.channels[:, :, :side, :side])

    def _conditioning(self, embedding: nn.Module, timestep: Tensor, added: Tensor) -> Tensor:
        """Time and class as of `CombinedTimestepLabelEmbeddings`, which would drop classes in training, and ``added``;
        (B, D)."""
        times = embedding.timestep_embedder(embedding.time_proj(timestep).to(added.dtype))
        return times + embedding.class_embedder.embedding_table(self.label.expand(len(added))) + added

    def _block(self, block: Any, h: Tensor, timestep: Tensor, added: Tensor) -> Tensor:
        """`BasicTransformerBlock.forward` of adaLN-Zero, (B, N, D), with more conditioning."""
        emb = block.norm1.linear(silu(self._conditioning(block.norm1.emb, timestep, added)))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = emb.chunk(6, dim=1)  # (B, D) each
        attended = block.attn1(block.norm1.norm(h) * (1 + scale[:, None]) + shift[:, None])
        h = gate.unsqueeze(1) * attended + h
        inner = block.norm3(h) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        return gate_mlp.unsqueeze(1) * block.ff(inner) + h
