"""Frozen text encoders of transformers, by folder or hub name; only JSON and safetensors of them are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmdiff.errors import InputError
from mmdiff.trust import check_links, damage

_FRAME = 2  # tokens that encoders put around a text


def read_encoder_config(name: str) -> dict[str, Any]:
    """The config of the text encoder in a folder or a repository of the hub.

    Raises:
        InputError: it cannot be read.
    """
    from transformers import AutoConfig

    check_links("encoder", name)
    with damage("encoder", name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        _class_of(config.get_text_config())
        return {k: v for k, v in config.get_text_config().to_diff_dict().items() if not k.startswith("_")} | {
            "model_type": config.get_text_config().model_type
        }


def _class_of(config: Any) -> Any:
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING

    if type(config) not in MODEL_FOR_TEXT_ENCODING_MAPPING:
        raise InputError("encoder", config.model_type, "is no text encoder of transformers, such as CLIP, T5, BERT")
    return MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)]


class FrozenEncoder(nn.Module):
    """A text encoder that stays as it is; a text is the mean of the hidden states of its tokens.

    Args:
        name: folder or repository of its weights, read where a run starts.
        config: of transformers.
        length: of the longest text in tokens.
    """

    def __init__(self, name: str, config: Mapping[str, Any], length: int) -> None:
        super().__init__()
        from transformers import AutoConfig

        self.name = name
        settings = dict(config)
        with damage("encoder_config", name):
            self.config = AutoConfig.for_model(settings.pop("model_type", None), **settings)
            self.network = _class_of(self.config)(self.config)
        self.network.requires_grad_(False)
        self.network.eval()
        self.width = self.config.hidden_size
        most = getattr(self.config, "max_position_embeddings", None)
        if most is not None and length + _FRAME > most:
            raise InputError("max_tokens", length, f"the encoder reads {most - _FRAME} tokens of a text; set that")

    def train(self, mode: bool = True) -> FrozenEncoder:
        """It stays in evaluation mode."""
        return super().train(False)

    def load_initial_weights(self) -> None:
        """Read the weights that were named."""
        with damage("encoder", self.name):
            network, found = type(self.network).from_pretrained(
                self.name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
            if found["missing_keys"]:
                raise InputError("encoder", self.name, f"its weights lack {sorted(found['missing_keys'])[0]}")
            self.network.load_state_dict(network.float().state_dict())

    @torch.no_grad()
    def forward(self, value: Tensor, end: int, frame: tuple[list[int], list[int]]) -> Tensor:
        """Texts (B, L) -> (B, width).

        Args:
            value: token ids, ``end`` from the end on.
            end: the id of the end token, which the encoder does not know.
            frame: ids that the encoder wants before and after a text.
        """
        before, after = frame
        lengths = (value != end).sum(dim=1)  # (B,)
        ids = value.new_zeros(len(value), len(before) + value.shape[1] + len(after))
        ids[:, : len(before)] = value.new_tensor(before)
        ids[:, len(before) : len(before) + value.shape[1]] = value.masked_fill(value == end, 0)
        for offset, number in enumerate(after):
            ids.scatter_(1, (len(before) + lengths + offset)[:, None], number)
        there = torch.arange(ids.shape[1], device=ids.device) < (len(before) + lengths + len(after))[:, None]
        hidden = self.network(input_ids=ids, attention_mask=there.long()).last_hidden_state.float()
        counted = there[..., None].float()
        return (hidden * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)
