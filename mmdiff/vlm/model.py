"""A vision-language model that sees a set of photos as it would see one: their tokens are fused behind its encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdiff.errors import InputError
from mmdiff.modalities.fusion import Fused, build_fusion
from mmdiff.vlm.architectures import ARCHITECTURES

WEIGHTS, SETTINGS = "fusion.safetensors", "fusion.json"


class Answered(NamedTuple):
    """``loss`` of the labels or None, ``logits`` (B, length, vocabulary), ``weights`` (B, n) of the images."""

    loss: Tensor | None
    logits: Tensor
    weights: Tensor


class Generated(NamedTuple):
    """``tokens`` (B, new) without the prompt, ``weights`` (B, n) of the images."""

    tokens: Tensor
    weights: Tensor


class VisionLanguageModel(nn.Module):
    """Image tokens (B, n, tokens, d) are fused to (B, tokens, d) and go on as those of a single image.

    Only the fusion learns (`learn` says otherwise): the model around it is frozen and stays in evaluation mode. With
    one image per set everything equals the model of transformers, to the last bit on a CPU.

    Args:
        model: a `Blip2ForConditionalGeneration` or a `LlavaForConditionalGeneration`.
        fusion: a key of `mmdiff.modalities.fusion.FUSIONS`; ``hidden``: width of its layer.

    Raises:
        InputError: for another architecture or fusion.
    """

    def __init__(self, model: Any, fusion: str = "attention", hidden: int = 128) -> None:
        super().__init__()
        self.parts = _architecture(model.config.model_type)(model)
        self.model = model.eval()
        self._set_fusion(fusion, hidden)
        self.learn("fusion")

    @classmethod
    def from_pretrained(cls, name: str | Path, fusion: str = "attention", hidden: int = 128, **loading: Any) -> Self:
        """By hub name or folder; ``loading`` goes to transformers (``dtype``, ``device_map``, …).

        Raises:
            InputError: when it cannot be loaded, and as the class does.
        """
        import transformers

        # without the first transformers asks on the terminal; pickles are not read
        loading = {"trust_remote_code": False, "use_safetensors": True, **loading}
        try:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            architecture = _architecture(config.model_type)
            model = getattr(transformers, architecture.model_class).from_pretrained(name, **loading)
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise InputError("model", str(name), f"cannot be loaded ({reason})") from error
        return cls(model, fusion, hidden)

    def _set_fusion(self, kind: str, hidden: int) -> None:
        self.fusion = build_fusion(kind, self.parts.width, hidden).to(self.model.device)
        self.settings = {"fusion": kind, "dim": self.parts.width, "hidden": hidden}

    def train(self, mode: bool = True) -> Self:
        """The model of transformers stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def learn(self, part: str) -> list[nn.Parameter]:
        """Choose what learns, everything else is frozen.

        Args:
            part: "fusion"; "connector": what stands between it and the language model; "all".

        Returns:
            Its parameters.

        Raises:
            InputError: for another name.
        """
        parts = {"fusion": self.fusion.parameters, "connector": self.parts.connector, "all": self.parameters}
        if part not in parts:
            raise InputError("part", part, f"choose one of {', '.join(parts)}")
        self.requires_grad_(False)
        chosen = list(parts[part]())
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen

    # ----------------------------------------------------------------------------------------------- images and text

    def fuse(self, images: Tensor, mask: Tensor) -> Fused:
        """Preprocessed images (B, n, 3, H, W), of which ``mask`` (B, n) says where one is -> tokens (B, tokens, d)."""
        if images.ndim != 5 or mask.dtype != torch.bool or mask.shape != images.shape[:2]:
            shown = f"images {tuple(images.shape)}, mask {mask.dtype} {tuple(mask.shape)}"
            raise InputError("images", shown, "needs images (B, n, 3, H, W) and a torch.bool mask (B, n)")
        learns = any(parameter.requires_grad for parameter in self.parts.vision.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            found = self.parts.encode(images[mask].to(self.model.dtype))  # (N, tokens, d), of the members only
        members = found.new_zeros(*mask.shape, *found.shape[1:])  # (B, n, tokens, d)
        return self.fusion(members.masked_scatter(mask[..., None, None], found), mask)

    def forward(
        self, images: Tensor, mask: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Answered:
        """The next tokens, and with ``labels`` their loss.

        Args:
            images, mask: see `fuse`; fewer than one image in a set is refused.
            input_ids: (B, length) with as many image tokens as one image has, which `Reader` prepares.
            attention_mask: (B, length), 0 on padding.
            labels: for a decoder alone (B, length) in the places of ``input_ids``, else the decoder's own text
                (B, …); −100 is ignored.
        """
        embeds, weights = self._embeds(images, mask, input_ids)
        # a decoder that is given no text derives it from the labels
        found = self.parts.language(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels)
        return Answered(found.loss, found.logits, weights)

    @torch.no_grad()
    def generate(
        self, images: Tensor, mask: Tensor, input_ids: Tensor, attention_mask: Tensor, **settings: Any
    ) -> Generated:
        """Text for each set; ``settings`` are those of transformers' ``generate``: max_new_tokens, num_beams, …"""
        embeds, weights = self._embeds(images, mask, input_ids)
        tokens = self.parts.language.generate(inputs_embeds=embeds, attention_mask=attention_mask, **settings)
        return Generated(tokens, weights)

    def _embeds(self, images: Tensor, mask: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(embeddings (B, length, width) with the fused images in their places, weights (B, n))."""
        fused, weights = self.fuse(images, mask)
        seen = self.parts.connect(fused)  # (B, k, width)
        places = input_ids == self.model.config.image_token_id
        if not (places.sum(dim=1) == seen.shape[1]).all() or len(places) != len(seen):
            remedy = (
                f"needs {seen.shape[1]} image tokens (id {self.model.config.image_token_id}) in each of {len(seen)}"
            )
            raise InputError("input_ids", f"{places.sum(dim=1).tolist()} image tokens", remedy)
        text = self.model.get_input_embeddings()(input_ids)  # (B, length, width)
        return text.masked_scatter(places[..., None], seen.to(text)), weights

    # ---------------------------------------------------------------------------------------------------------- files

    def save_fusion(self, folder: str | Path) -> None:
        """Write the fusion alone: `fusion.safetensors`, and `fusion.json` with what it is and what it stood in."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.fusion.state_dict().items()}, folder / WEIGHTS)
        config = self.model.config
        facts = self.settings | {"architecture": config.model_type, "model": str(config.name_or_path)}
        (folder / SETTINGS).write_text(json.dumps(facts, indent=1) + "\n")

    def load_fusion(self, folder: str | Path) -> None:
        """Put the fusion of a folder in the place of this one.

        Raises:
            InputError: when there is none, or it is of another width.
        """
        folder = Path(folder)
        for file in (WEIGHTS, SETTINGS):
            if not (folder / file).is_file():
                raise InputError("fusion", str(folder), f"has no {file}")
        facts = json.loads((folder / SETTINGS).read_text())
        if facts["dim"] != self.parts.width:
            remedy = (
                f"fuses tokens of {facts['dim']} numbers (of {facts['model']}), this model's have {self.parts.width}"
            )
            raise InputError("fusion", str(folder), remedy)
        self._set_fusion(facts["fusion"], facts["hidden"])
        self.fusion.load_state_dict(load_file(folder / WEIGHTS, device=str(self.model.device)))


def _architecture(model_type: str) -> Any:
    if model_type not in ARCHITECTURES:
        raise InputError("model", model_type, f"is none of the architectures {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]
