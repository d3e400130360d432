"""The parts of a vision-language model around the fusion: vision encoder, connector and language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Architecture(ABC):
    """Access to the parts of a model of transformers.

    Args:
        model: of the class `model_class`.
    """

    model_class: ClassVar[str]  # its name in transformers

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    @abstractmethod
    def vision(self) -> nn.Module:
        """The encoder of one image."""

    @property
    @abstractmethod
    def width(self) -> int:
        """d of the tokens from `encode`."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> tokens (N, tokens, d)."""

    @abstractmethod
    def connect(self, tokens: Tensor) -> Tensor:
        """Tokens of one image or fused tokens (B, tokens, d) -> inputs of the language model (B, k, width)."""

    @abstractmethod
    def connector(self) -> Iterable[nn.Parameter]:
        """The parameters of `connect`."""

    @property
    @abstractmethod
    def language(self) -> Any:
        """The language model, which takes ``inputs_embeds``, ``attention_mask`` and ``labels``, and generates."""

    @abstractmethod
    def prompt(self, text: str, image_token: str) -> str:
        """The text in the format of the model's processor."""

    @property
    def continues(self) -> bool:
        """Whether an answer continues the prompt, as in decoder-only models; else the decoder starts anew."""
        return not self.language.config.is_encoder_decoder


class Blip2(Architecture):
    """Vision encoder → fusion → Q-Former → projection → language model."""

    model_class = "Blip2ForConditionalGeneration"

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

    def prompt(self, text: str, image_token: str) -> str:
        return text  # the processor puts its image tokens first


class Llava(Architecture):
    """Vision encoder → fusion → projection → language model."""

    model_class = "LlavaForConditionalGeneration"

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

    @property
    def language(self) -> Any:
        return self.model

    def prompt(self, text: str, image_token: str) -> str:
        return text if image_token in text else f"{image_token}\n{text}"


ARCHITECTURES: dict[str, type[Architecture]] = {"blip-2": Blip2, "llava": Llava}
