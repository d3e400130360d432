"""LLaVA (Liu et al., 2023, arXiv:2304.08485) and LLaVA-OneVision (Li et al., 2024, arXiv:2408.03326)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mmdiff.vlm.architecture import Architecture, ChatArchitecture, Photos


class Llava(Architecture):
    """Vision encoder → fusion → projection → language model."""

    @property
    def vision(self) -> nn.Module:
        return self.model.model.vision_tower

    @property
    def _layers(self) -> list[int]:
        layers = self.model.config.vision_feature_layer
        return [layers] if isinstance(layers, int) else list(layers)

    @property
    def width(self) -> int:
        return self.model.config.vision_config.hidden_size * len(self._layers)

    def encode(self, pixels: Tensor) -> Tensor:
        states = self.vision(pixels, output_hidden_states=True).hidden_states
        tokens = torch.cat([states[layer] for layer in self._layers], dim=-1)
        return tokens[:, 1:] if self.model.config.vision_feature_select_strategy == "default" else tokens

    def connect(self, tokens: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(tokens)

    def connector(self) -> Iterable[nn.Parameter]:
        return self.model.model.multi_modal_projector.parameters()


class LlavaOnevision(ChatArchitecture, Llava):
    """Vision encoder → fusion → projection, and a token that ends the image → language model.

    A photo has the form of one of several in a prompt: padded to a square, one tile.
    """

    def connect(self, tokens: Tensor) -> Tensor:
        images = super().connect(tokens)
        end = self.model.model.image_newline.to(images).expand(len(images), 1, -1)
        return torch.cat([images, end], dim=1)

    def connector(self) -> Iterable[nn.Parameter]:
        return chain(super().connector(), [self.model.model.image_newline])

    def pixels(self, processor: Any, photos: Photos) -> Tensor:
        # a prompt of one photo alone would cut it into tiles
        together = processor.image_processor(images=[[*photos, photos[0]]], return_tensors="pt")
        return together["pixel_values"][:-1, 0]  # (N + 1, tiles, 3, H, W)

    def tokens(self, processor: Any, texts: Sequence[str], photos: Sequence[Photos]) -> Any:
        count = processor.num_image_tokens + (processor.vision_feature_select_strategy != "default")
        token = str(processor.image_token)
        return processor.tokenizer(
            [text.replace(token, token * count) for text in texts],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
