"""Image sets and texts as the tensors of a vision-language model, and its tokens as texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image as PILImage
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdiff.errors import InputError
from mmdiff.vlm.architecture import Photos
from mmdiff.vlm.model import IGNORED, VisionLanguageModel


class Inputs(NamedTuple):
    """Arguments of `VisionLanguageModel.forward`: ``images`` (B, n, 3, H, W), ``mask`` (B, n), ``input_ids`` and
    ``attention_mask`` (B, length), ``labels`` (B, length), or (B, …) of the decoder's text, or None."""

    images: Tensor
    mask: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None = None


class Reader:
    """The model's processor for image sets.

    Args:
        model: that answers.
        processor: of transformers; default: that of the model's folder or hub name.
        size: side in pixels of a square to which photos are resized first; default: the processor alone decides. The
            photos of a batch need the same number of tokens, which Qwen derives from their shape.

    Raises:
        InputError: if the model has no processor, for a processor without a token that ends or pads a text, and for a
            size below 1.
    """

    def __init__(self, model: VisionLanguageModel, processor: Any = None, size: int | None = None) -> None:
        if processor is None:
            processor = _processor(str(model.model.config.name_or_path))
        if size is not None and size < 1:
            raise InputError("size", size, "must be at least 1 pixel")
        self.size = size
        self.processor, self.tokenizer, self.parts = processor, processor.tokenizer, model.parts
        end = self.parts.language.generation_config.eos_token_id
        if end is None or self.tokenizer.pad_token_id is None:
            missing = "an eos_token_id" if end is None else "a pad token in the tokenizer"
            raise InputError("model", str(model.model.config.name_or_path), f"needs {missing}")
        self.end: int = end[0] if isinstance(end, list) else end

    def __call__(
        self,
        sets: Sequence[Photos],
        prompts: Sequence[str],
        answers: Sequence[str] | None = None,
        fused: bool = True,
    ) -> Inputs:
        """Inputs of one prompt per set, and of one answer per set for training.

        Args:
            sets: photos.
            prompts, answers: texts. A prompt may hold image tokens of the processor; else they are put before it.
            fused: False for image tokens of every photo, and not of one in place of all.

        Raises:
            InputError: for an empty set, for another number of prompts or answers than of sets, for another number of
                image tokens in a prompt than of images, and for photos with different numbers of tokens.
        """
        self.parts.check(fused)
        for key, texts in (("prompts", prompts), ("answers", answers)):
            if texts is not None and len(texts) != len(sets):
                raise InputError(key, len(texts), f"needs one for each of {len(sets)} sets")
        sets = [[self._prepared(photo) for photo in members] for members in sets]
        images, mask = self._images(sets)
        shown = [members[:1] for members in sets] if fused else sets
        texts = [self._prompt(prompt, len(members)) for prompt, members in zip(prompts, shown)]
        encoded = self.parts.tokens(self.processor, texts, shown)
        ids, attention = encoded["input_ids"], encoded["attention_mask"]
        if answers is None:
            return Inputs(images, mask, ids, attention)
        tokens, real = self._answers(answers)
        labels = tokens.masked_fill(~real, IGNORED)
        if not self.parts.continues:
            return Inputs(images, mask, ids, attention, labels)
        return Inputs(
            images,
            mask,
            torch.cat([ids, tokens], dim=1),
            torch.cat([attention, real.to(attention)], dim=1),
            torch.cat([torch.full_like(ids, IGNORED), labels], dim=1),
        )

    def pixels(self, photos: Photos) -> Tensor:
        """N photos as the model sees them (N, 3, H, W)."""
        return self.parts.pixels(self.processor, [self._prepared(photo) for photo in photos])

    def texts(self, tokens: Tensor) -> list[str]:
        """Generated tokens (B, new) as texts."""
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _prepared(self, photo: PILImage.Image) -> PILImage.Image:
        photo = photo.convert("RGB")
        return photo.resize((self.size, self.size), PILImage.Resampling.BICUBIC) if self.size else photo

    def _prompt(self, text: str, images: int) -> str:
        made, token = self.parts.prompt(text, self.processor, images), str(self.processor.image_token)
        if self.parts.several and made.count(token) != images:
            raise InputError("prompts", text, f"needs {images} × {token}, or none")
        return made

    def _images(self, sets: Sequence[Photos]) -> tuple[Tensor, Tensor]:
        counts = torch.tensor([len(members) for members in sets])
        if not len(sets) or not counts.all():
            raise InputError("sets", counts.tolist(), "every set needs an image at least")
        flat = [photo for members in sets for photo in members]
        pixels = self._pixels(flat)
        mask = torch.arange(int(counts.max())) < counts[:, None]
        images = pixels.new_zeros(*mask.shape, *pixels.shape[1:])
        images[mask] = pixels
        return images, mask

    def _pixels(self, photos: Photos) -> Tensor:
        """N photos -> (N, 3, H, W)."""
        try:
            return self.parts.pixels(self.processor, photos)
        except InputError:
            raise
        except ValueError as error:  # of the processor: an odd shape, or several that do not fit together
            shapes = sorted({photo.size for photo in photos})
            remedy = f"photos of these widths and heights cannot be read ({error}); Reader(model, size=…) makes squares"
            raise InputError("sets", shapes, remedy) from error

    def _answers(self, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(tokens with an end token (B, length), True for tokens and False for padding)."""
        texts = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
        tokens = [torch.tensor([*ids, self.end]) for ids in texts]
        lengths = torch.tensor([len(ids) for ids in tokens])
        padded = pad_sequence(tokens, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def _processor(name: str) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError("model", name, f"has no processor that can be loaded ({reason})") from error
