"""Qwen3-VL (Bai et al., 2025, arXiv:2511.21631) and the families that keep its vision encoder."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from mmdiff.errors import InputError
from mmdiff.vlm.architecture import ChatArchitecture, Photos


class Qwen3Vl(ChatArchitecture):
    """Vision encoder → fusion → merger of 2 × 2 tokens → language model with positions in two dimensions.

    With DeepStack the language model also adds tokens of earlier layers of the encoder, each through its own merger:
    these are fused as further features of the same token. Photos keep their shape, so those of a batch must agree.

    Raises:
        InputError: for transformers that take no encoded images.
    """

    fixed = False

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
            import transformers

            remedy = f"fusing images of {type(model).__name__} needs a newer one (5.23 does)"
            raise InputError("transformers", transformers.__version__, remedy)

    @property
    def _layers(self) -> list[int]:
        return list(getattr(self.model.config.vision_config, "deepstack_visual_indexes", ()))

    @property
    def _mergers(self) -> list[nn.Module]:
        """Of the earlier layers and of the last one."""
        visual = self.model.model.visual
        return [*getattr(visual, "deepstack_merger_list", ()), visual.merger]

    @property
    def vision(self) -> nn.Module:
        visual = self.model.model.visual
        return nn.ModuleList([visual.patch_embed, visual.pos_embed, visual.blocks])

    @property
    def width(self) -> int:
        return self.model.config.vision_config.hidden_size * (len(self._layers) + 1)

    def _grid(self, size: tuple[int, int], images: Tensor) -> Tensor:
        """(N, 3) of N images: frames, rows and columns of patches."""
        patch = self.model.config.vision_config.patch_size
        return torch.tensor([[1, size[0] // patch, size[1] // patch]], device=images.device).expand(len(images), -1)

    def encode(self, pixels: Tensor) -> Tensor:
        config = self.model.config.vision_config
        patches = repeat(  # neighbours that a merger joins follow one another; an image is a video of equal frames
            pixels,
            "n c (h i p) (w j q) -> (n h w i j) (c t p q)",
            t=config.temporal_patch_size,
            i=config.spatial_merge_size,
            j=config.spatial_merge_size,
            p=config.patch_size,
            q=config.patch_size,
        )
        grid = self._grid(pixels.shape[-2:], pixels)
        output = self.model.model.visual(patches, grid_thw=grid, output_hidden_states=bool(self._layers))
        states = [*(output.hidden_states[layer + 1] for layer in self._layers), output.last_hidden_state]
        return rearrange(torch.cat(states, dim=-1), "(n k) d -> n k d", n=len(pixels))

    def connect(self, tokens: Tensor) -> Tensor:
        mergers = self._mergers
        parts = tokens.flatten(0, 1).chunk(len(mergers), dim=-1)  # (B · tokens, d) of each layer
        merged = torch.cat([merger(part.contiguous()) for merger, part in zip(mergers, parts)], dim=-1)
        return rearrange(merged, "(n k) d -> n k d", n=len(tokens))

    def connector(self) -> Iterable[nn.Parameter]:
        return chain.from_iterable(merger.parameters() for merger in self._mergers)

    def arguments(self, images: Tensor, input_ids: Tensor, size: tuple[int, int]) -> dict[str, Any]:
        """The model itself puts the images into the prompt, as it derives their positions and adds earlier layers."""
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        *earlier, last = (list(part) for part in images.chunk(len(self._mergers), dim=-1))
        encoded = BaseModelOutputWithDeepstackFeatures(pooler_output=last, deepstack_features=earlier or None)
        return {
            "input_ids": input_ids,
            "mm_encoder_outputs": {"image": encoded},
            "image_grid_thw": self._grid(size, images),
            "mm_token_type_ids": (input_ids == self.model.config.image_token_id).int(),
        }

    def pixels(self, processor: Any, photos: Photos) -> Tensor:
        reader = processor.image_processor
        encoded = reader(images=list(photos), return_tensors="pt")
        grids = encoded["image_grid_thw"]
        if (grids != grids[0]).any():
            shapes = " and ".join(f"{rows} × {columns}" for _, rows, columns in grids.unique(dim=0).tolist())
            remedy = "photos of one batch need the same grid of patches: Reader(model, size=…) makes all of one size"
            raise InputError("sets", f"{shapes} patches", remedy)
        rows, columns = grids[0, 1:].tolist()
        return rearrange(
            encoded["pixel_values"],
            "(n h w i j) (c t p q) -> t n c (h i p) (w j q)",
            t=reader.temporal_patch_size,
            h=rows // reader.merge_size,
            w=columns // reader.merge_size,
            i=reader.merge_size,
            j=reader.merge_size,
            p=reader.patch_size,
            q=reader.patch_size,
        )[0]

    def placeholder(self, processor: Any) -> str:
        return f"{processor.vision_start_token}{processor.image_token}{processor.vision_end_token}"
