"""Sets of photos and texts as the tensors of a vision-language model, and its tokens as texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image as PILImage
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdiff.errors import InputError
from mmdiff.vlm.model import VisionLanguageModel

IGNORED = -100  # a label that costs nothing


class Inputs(NamedTuple):
    """Arguments of `VisionLanguageModel.forward`: ``images`` (B, n, 3, H, W), ``mask`` (B, n), ``input_ids`` and
    ``attention_mask`` (B, length), ``labels`` (B, length), or (B, …) of a decoder's own text, or None."""

    images: Tensor
    mask: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None = None


class Reader:
    """The model's own processor, to which a set of photos is one image.

    Args:
        model: whose language answers.
        processor: of transformers; default: that in the folder, or under the name, that the model came from.
    """

    def __init__(self, model: VisionLanguageModel, processor: Any = None) -> None:
        if processor is None:
            from transformers import AutoProcessor

            processor = AutoProcessor.from_pretrained(model.model.config.name_or_path, trust_remote_code=False)
        self.processor, self.tokenizer, self.parts = processor, processor.tokenizer, model.parts
        end = self.parts.language.generation_config.eos_token_id
        if end is None or self.tokenizer.pad_token_id is None:
            missing = "an eos_token_id" if end is None else "a pad token in the tokenizer"
            raise InputError("model", str(model.model.config.name_or_path), f"needs {missing}")
        self.end: int = end[0] if isinstance(end, list) else end

    def __call__(
        self, sets: Sequence[Sequence[PILImage.Image]], prompts: Sequence[str], answers: Sequence[str] | None = None
    ) -> Inputs:
        """One prompt per set, and where the model shall learn one answer.

        Raises:
            InputError: for an empty set, or other numbers of prompts or answers than of sets.
        """
        for key, texts in (("prompts", prompts), ("answers", answers)):
            if texts is not None and len(texts) != len(sets):
                raise InputError(key, len(texts), f"needs one for each of {len(sets)} sets")
        images, mask = self._images(sets)
        told = [self.parts.prompt(prompt, str(self.processor.image_token)) for prompt in prompts]
        # the prompt that one image would have; padded on the left, so that the answer follows at once
        asked = self.processor(
            images=[members[0].convert("RGB") for members in sets],
            text=told,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        ids, attention = asked["input_ids"], asked["attention_mask"]
        if answers is None:
            return Inputs(images, mask, ids, attention)
        own, there = self._answers(answers)
        labels = own.masked_fill(~there, IGNORED)
        if not self.parts.continues:
            return Inputs(images, mask, ids, attention, labels)
        return Inputs(
            images,
            mask,
            torch.cat([ids, own], dim=1),
            torch.cat([attention, there.to(attention)], dim=1),
            torch.cat([torch.full_like(ids, IGNORED), labels], dim=1),
        )

    def texts(self, tokens: Tensor) -> list[str]:
        """Generated tokens (B, new) as texts."""
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _images(self, sets: Sequence[Sequence[PILImage.Image]]) -> tuple[Tensor, Tensor]:
        counts = torch.tensor([len(members) for members in sets])
        if not len(sets) or not counts.all():
            raise InputError("sets", counts.tolist(), "every set needs an image at least")
        flat = [image.convert("RGB") for members in sets for image in members]
        pixels = self.processor.image_processor(images=flat, return_tensors="pt")["pixel_values"]  # (N, 3, H, W)
        mask = torch.arange(int(counts.max())) < counts[:, None]
        images = pixels.new_zeros(*mask.shape, *pixels.shape[1:])
        images[mask] = pixels
        return images, mask

    def _answers(self, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(tokens with an end (B, length), where they are)."""
        own = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
        tokens = [torch.tensor([*ids, self.end]) for ids in own]
        lengths = torch.tensor([len(one) for one in tokens])
        padded = pad_sequence(tokens, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return padded, torch.arange(padded.shape[1]) < lengths[:, None]
