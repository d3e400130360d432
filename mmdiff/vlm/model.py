"""A vision-language model that reads an image set as one image: the tokens are fused after its encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdiff.errors import InputError
from mmdiff.modalities.fusion import QUERY_FUSIONS, Fused, build_fusion
from mmdiff.vlm.architectures import architecture, architecture_of, unloadable

WEIGHTS, SETTINGS = "fusion.safetensors", "fusion.json"
IGNORED = -100  # a label without a loss


class Answered(NamedTuple):
    """``loss`` of the labels or None, ``logits`` (B, length, vocabulary), ``weights`` (B, n) of the images, or None
    where they were not fused."""

    loss: Tensor | None
    logits: Tensor
    weights: Tensor | None


class Generated(NamedTuple):
    """``tokens`` (B, new) without the prompt, ``weights`` (B, n) of the images, or None where they were not fused."""

    tokens: Tensor
    weights: Tensor | None


class VisionLanguageModel(nn.Module):
    """Image tokens (B, n, tokens, d) are fused to (B, tokens, d), which replace those of a single image.

    By default only the fusion learns, see `learn`. The model around it is frozen and stays in evaluation mode. With one
    image per set the results equal those of the model of transformers, bit for bit on a CPU. With
    ``fused=False`` every image has its own tokens in the prompt, as the model itself reads several images.

    Args:
        model: of transformers, of a type in `ARCHITECTURES`.
        fusion: a key of `mmdiff.modalities.fusion.FUSIONS`, or of `QUERY_FUSIONS`, which is asked the question, see
            `question`; ``hidden``: width of its layer.

    Raises:
        InputError: for another architecture or fusion.
    """

    def __init__(self, model: Any, fusion: str = "attention", hidden: int = 128) -> None:
        super().__init__()
        self.parts = architecture(model.config.model_type)(model)
        self.model = model.eval()
        self._set_fusion(fusion, hidden)
        self.learn("fusion")

    @classmethod
    def from_pretrained(cls, name: str | Path, fusion: str = "attention", hidden: int = 128, **loading: Any) -> Self:
        """Load by hub name or folder; ``loading`` are arguments of transformers (``dtype``, ``device_map``, …).

        Raises:
            InputError: if it cannot be loaded, and as of the class.
        """
        import transformers

        # without trust_remote_code transformers asks on the terminal; without use_safetensors it reads pickles
        loading = {"trust_remote_code": False, "use_safetensors": True, **loading}
        architecture_of(name)  # refuses before weights are loaded
        try:
            model = transformers.AutoModelForImageTextToText.from_pretrained(name, **loading)
        except (OSError, ValueError, RuntimeError) as error:
            raise unloadable(name, error) from error
        return cls(model, fusion, hidden)

    def _set_fusion(self, kind: str, hidden: int) -> None:
        query_dim = self._text_width if kind in QUERY_FUSIONS else None
        self.fusion = build_fusion(kind, self.parts.width, hidden, query_dim).to(self.model.device)
        self.settings = {"fusion": kind, "dim": self.parts.width, "hidden": hidden, "query_dim": query_dim}

    @property
    def _text_width(self) -> int:
        return self.model.get_input_embeddings().embedding_dim

    def train(self, mode: bool = True) -> Self:
        """The model of transformers stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def learn(self, part: str) -> list[nn.Parameter]:
        """Choose the trainable part; the rest is frozen.

        Args:
            part: "fusion"; "connector": the layers between the fusion and the language model; "all".

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

    def question(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor | None:
        """What a prompt asks (B, width of the text), or None where the fusion takes no query.

        The mean of the frozen embeddings of its tokens, without those of images and answers, with mean square 1.
        Arguments as of `forward`.
        """
        if not self.fusion.query_dim:
            return None
        asked = attention_mask.bool() & (input_ids != self.model.config.image_token_id)
        if labels is not None and self.parts.continues:
            asked = asked & (labels == IGNORED)
        with torch.no_grad():
            embeds = self.model.get_input_embeddings()(input_ids).float()  # (B, length, width)
        mean = embeds.mul(asked[..., None]).sum(dim=1)  # its length does not count
        return mean * mean.square().mean(dim=1, keepdim=True).add(1e-12).rsqrt()

    def fuse(self, images: Tensor, mask: Tensor, query: Tensor | None = None) -> Fused:
        """Preprocessed images (B, n, 3, H, W) and their ``mask`` (B, n), True for images -> tokens (B, tokens, d).

        ``query``: of `question`, where the fusion takes one.
        """
        tokens = self._encode(images, mask)
        members = tokens.new_zeros(*mask.shape, *tokens.shape[1:])  # (B, n, tokens, d)
        return self.fusion(members.masked_scatter(mask[..., None, None], tokens), mask, query)

    def _encode(self, images: Tensor, mask: Tensor) -> Tensor:
        """The tokens (N, tokens, d) of the members alone."""
        if images.ndim != 5 or mask.dtype != torch.bool or mask.shape != images.shape[:2]:
            shapes = f"images {tuple(images.shape)}, mask {mask.dtype} {tuple(mask.shape)}"
            raise InputError("images", shapes, "needs images (B, n, 3, H, W) and a torch.bool mask (B, n)")
        learns = any(parameter.requires_grad for parameter in self.parts.vision.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return self.parts.encode(images[mask].to(self.model.dtype))

    def forward(
        self,
        images: Tensor,
        mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        fused: bool = True,
    ) -> Answered:
        """The next tokens, and with ``labels`` their loss.

        Args:
            images, mask: as of `fuse`; a set without an image is refused.
            input_ids: (B, length) from `Reader`, with the image tokens of one image, or of all that are not fused.
            attention_mask: (B, length), 0 on padding.
            labels: of a decoder-only model (B, length) at the positions of ``input_ids``, else the decoder's text
                (B, …); −100 is ignored.
            fused: False for each image by itself in the prompt.
        """
        query = self.question(input_ids, attention_mask, labels)
        arguments, weights = self._arguments(images, mask, input_ids, query, fused)
        # a decoder without input text derives it from the labels
        output = self.parts.language(**arguments, attention_mask=attention_mask, labels=labels)
        return Answered(output.loss, output.logits, weights)

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        fused: bool = True,
        **settings: Any,
    ) -> Generated:
        """Text for each set; ``settings`` are of transformers' ``generate``: max_new_tokens, num_beams, …"""
        query = self.question(input_ids, attention_mask)
        arguments, weights = self._arguments(images, mask, input_ids, query, fused)
        tokens = self.parts.language.generate(**arguments, attention_mask=attention_mask, **settings)
        # with the prompt's tokens given, transformers returns them too
        return Generated(tokens[:, input_ids.shape[1] :] if "input_ids" in arguments else tokens, weights)

    def _arguments(
        self, images: Tensor, mask: Tensor, input_ids: Tensor, query: Tensor | None, fused: bool
    ) -> tuple[dict[str, Any], Tensor | None]:
        """(arguments of the language model, weights (B, n) or None)."""
        self.parts.check(fused)
        tokens, weights = self.fuse(images, mask, query) if fused else (self._encode(images, mask), None)
        connected, token = self.parts.connect(tokens), self.model.config.image_token_id  # (B or N, k, width)
        found = (input_ids == token).sum(dim=1)
        needed = connected.shape[1] * (mask.any(dim=1).long() if fused else mask.sum(dim=1))
        if not torch.equal(found, needed):
            remedy = f"needs {needed.tolist()} image tokens (id {token})"
            raise InputError("input_ids", f"{found.tolist()} image tokens", remedy)
        height, width = images.shape[-2:]
        return self.parts.arguments(connected, input_ids, (height, width)), weights

    # ---------------------------------------------------------------------------------------------------------- files

    def save_fusion(self, folder: str | Path) -> None:
        """Write the fusion alone: `fusion.safetensors`, and `fusion.json` with its settings and the model's name."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.fusion.state_dict().items()}, folder / WEIGHTS)
        config = self.model.config
        facts = self.settings | {"architecture": config.model_type, "model": str(config.name_or_path)}
        (folder / SETTINGS).write_text(json.dumps(facts, indent=1) + "\n")

    def load_fusion(self, folder: str | Path) -> None:
        """Replace the fusion by that of a folder.

        Raises:
            InputError: if the folder has none, or one of another width.
        """
        folder = Path(folder)
        for file in (WEIGHTS, SETTINGS):
            if not (folder / file).is_file():
                raise InputError("fusion", str(folder), f"has no {file}")
        facts = json.loads((folder / SETTINGS).read_text())
        if facts["dim"] != self.parts.width:
            remedy = f"fuses tokens of width {facts['dim']} (of {facts['model']}), this model has {self.parts.width}"
            raise InputError("fusion", str(folder), remedy)
        if facts.get("query_dim") not in (None, self._text_width):
            remedy = f"is asked texts of width {facts['query_dim']} (of {facts['model']}), here {self._text_width}"
            raise InputError("fusion", str(folder), remedy)
        self._set_fusion(facts["fusion"], facts["hidden"])
        self.fusion.load_state_dict(load_file(folder / WEIGHTS, device=str(self.model.device)))
