"""Small vision-language models of transformers' classes with random weights, which train on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmdiff.errors import InputError
from mmdiff.vlm.architecture import Architecture
from mmdiff.vlm.architectures import architecture
from mmdiff.vlm.small.blip import blip2, opt, t5
from mmdiff.vlm.small.idefics import idefics3, smolvlm
from mmdiff.vlm.small.llava import llava, llava_onevision
from mmdiff.vlm.small.parts import Sizes, word_tokenizer
from mmdiff.vlm.small.qwen import byte_tokenizer, qwen3_5, qwen3_vl, qwen4_exp

__all__ = ["SMALL", "Sizes", "make_small", "small_architecture"]

SMALL: dict[str, Callable[[Any, Sizes, dict[str, Any]], Any]] = {
    "blip-2": partial(blip2, opt),
    "blip-2-t5": partial(blip2, t5),
    "llava": llava,
    "llava-onevision": llava_onevision,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "qwen3-vl": qwen3_vl,
    "qwen3.5": qwen3_5,
    "qwen4-exp": qwen4_exp,
}
TOKENIZERS: dict[str, Callable[[Iterable[str]], Any]] = {"qwen3.5": byte_tokenizer, "qwen4-exp": byte_tokenizer}


def make_small(
    folder: str | Path, kind: str, texts: Iterable[str], sizes: Sizes | None = None, seed: int = 0, **more: Any
) -> None:
    """Write a model and its processor to a folder for `VisionLanguageModel.from_pretrained`.

    Args:
        folder: a new one.
        kind: a key of `SMALL`.
        texts: whose words are the vocabulary, in lower case.
        sizes: of the model.
        seed: of the weights.
        more: settings of the model's config.

    Raises:
        InputError: for another kind.
    """
    import transformers

    config, processor = _made(kind, texts, sizes or Sizes(), more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        for name, parameter in model.named_parameters():
            if name == "query_tokens":  # zeros otherwise, and equal queries stay equal
                nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def small_architecture(kind: str) -> type[Architecture]:
    """Of the model that `make_small` makes.

    Raises:
        InputError: for another kind.
    """
    config, _ = _made(kind, [], Sizes(), {})
    return architecture(config.model_type)


def _made(kind: str, texts: Iterable[str], sizes: Sizes, more: dict[str, Any]) -> Any:
    """(config, processor)"""
    if kind not in SMALL:
        raise InputError("kind", kind, f"choose one of {', '.join(SMALL)}")
    return SMALL[kind](TOKENIZERS.get(kind, word_tokenizer)(texts), sizes, more)
