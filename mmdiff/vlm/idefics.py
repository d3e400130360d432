"""Idefics3 (Laurençon et al., 2024, arXiv:2408.12637) and SmolVLM (Marafioti et al., 2025, arXiv:2504.05299)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from mmdiff.vlm.architecture import ChatArchitecture


class Idefics3(ChatArchitecture):
    """Vision encoder → fusion → pixel shuffle and projection → language model."""

    tiles = {"do_image_splitting": False}

    @property
    def vision(self) -> nn.Module:
        return self.model.model.vision_model

    @property
    def width(self) -> int:
        return self.model.config.vision_config.hidden_size

    def encode(self, pixels: Tensor) -> Tensor:
        return self.vision(pixel_values=pixels).last_hidden_state

    def connect(self, tokens: Tensor) -> Tensor:
        return self.model.model.connector(tokens)

    def connector(self) -> Iterable[nn.Parameter]:
        return self.model.model.connector.parameters()
