"""BLIP-2 (Li et al., 2023, arXiv:2301.12597)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmdiff.vlm.architecture import Architecture


class Blip2(Architecture):
    """Vision encoder → fusion → Q-Former → projection → language model."""

    several = False

    @property
    def vision(self) -> nn.Module:
        return self.model.vision_model

    @property
    def width(self) -> int:
        return self.model.config.vision_config.hidden_size

    def encode(self, pixels: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values=pixels).last_hidden_state

    def connect(self, tokens: Tensor) -> Tensor:
        queried = self.model.qformer(
            query_embeds=self.model.query_tokens.expand(len(tokens), -1, -1),
            encoder_hidden_states=tokens,
            encoder_attention_mask=torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device),
        )
        return self.model.language_projection(queried.last_hidden_state.to(tokens.dtype))

    def connector(self) -> Iterable[nn.Parameter]:
        parts = (self.model.qformer, self.model.language_projection)
        return [self.model.query_tokens, *(parameter for part in parts for parameter in part.parameters())]

    @property
    def language(self) -> Any:
        return self.model.language_model

    def prompt(self, text: str, processor: Any, images: int = 1) -> str:
        return text  # the processor puts its image tokens first
