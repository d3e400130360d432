"""The contract of a vision-language model's parts around the fusion: vision encoder, connector, language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from PIL import Image as PILImage
from torch import Tensor, nn

from mmdiff.errors import InputError

Photos = Sequence[PILImage.Image]


class Architecture(ABC):
    """Access to the parts of a model of transformers.

    Args:
        model: of transformers, with a language model that generates.
    """

    several: ClassVar[bool] = True  # whether a prompt may hold several images
    fixed: ClassVar[bool] = True  # whether photos of any shape have the same number of tokens
    tiles: ClassVar[dict[str, Any]] = {}  # settings of the processor that keep a photo in one tile

    def __init__(self, model: Any) -> None:
        self.model = model

    def check(self, fused: bool) -> None:
        """Refuse several images in a prompt where the model takes one.

        Raises:
            InputError: then.
        """
        if not fused and not self.several:
            raise InputError("fused", fused, f"{self.model.config.model_type} takes one image per prompt")

    # ----------------------------------------------------------------------------------------------------- the model

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
    def language(self) -> Any:
        """The language model, which takes `arguments`, ``attention_mask`` and ``labels``, and generates."""
        return self.model

    def arguments(self, images: Tensor, input_ids: Tensor, size: tuple[int, int]) -> dict[str, Any]:
        """Arguments of the language model.

        Args:
            images: (M, k, width) from `connect`, in the order of their tokens.
            input_ids: (B, length), with M · k image tokens.
            size: (H, W) of the images in pixels.
        """
        text = self.model.get_input_embeddings()(input_ids)  # (B, length, width)
        places = input_ids == self.model.config.image_token_id
        return {"inputs_embeds": text.masked_scatter(places[..., None], images.to(text))}

    @property
    def continues(self) -> bool:
        """Whether an answer continues the prompt, as in decoder-only models; else the decoder starts anew."""
        return not self.language.config.is_encoder_decoder

    # ------------------------------------------------------------------------------------------------- the processor

    def pixels(self, processor: Any, photos: Photos) -> Tensor:
        """N photos -> (N, 3, H, W), one tile each."""
        pixels = processor.image_processor(images=list(photos), return_tensors="pt", **self.tiles)["pixel_values"]
        return pixels.flatten(0, -4)  # some processors count the photos of a prompt in a further dimension

    def tokens(self, processor: Any, texts: Sequence[str], photos: Sequence[Photos]) -> Any:
        """B texts with placeholders, and their photos -> ``input_ids`` and ``attention_mask`` (B, length).

        They are padded on the left, so that an answer follows the prompt.
        """
        images = [photo for members in photos for photo in members]
        return processor(
            images=images, text=list(texts), padding=True, padding_side="left", return_tensors="pt", **self.tiles
        )

    def placeholder(self, processor: Any) -> str:
        """What stands for an image in a prompt."""
        return str(processor.image_token)

    def prompt(self, text: str, processor: Any, images: int = 1) -> str:
        """The text with placeholders of so many images, in the format of the processor.

        A text that has them already stays as it is.
        """
        if str(processor.image_token) in text:
            return text
        return f"{self.placeholder(processor) * images}\n{text}"


class ChatArchitecture(Architecture):
    """An architecture whose models were tuned on conversations: the processor's chat template makes the prompt."""

    def prompt(self, text: str, processor: Any, images: int = 1) -> str:
        if str(processor.image_token) in text or not processor.chat_template:
            return super().prompt(text, processor, images)
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
        turns = [{"role": "user", "content": content}]
        return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
