"""What the small models share: sizes, a tokenizer of words, and the settings that follow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

PAD, START, END, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"


class Sizes(NamedTuple):
    """``image`` and ``patch`` in pixels, ``width`` of all parts, ``layers`` and ``heads`` of the encoder and of the
    language model, ``queries`` of a Q-Former."""

    image: int = 32
    patch: int = 8
    width: int = 64
    layers: int = 2
    heads: int = 4
    queries: int = 4


def word_tokenizer(texts: Iterable[str]) -> Any:
    """One token per word and punctuation mark."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter, lower = pre_tokenizers.Whitespace(), normalizers.Lowercase()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(lower.normalize_str(text))}
    special = (PAD, START, END, UNKNOWN, IMAGE)
    vocabulary = {word: index for index, word in enumerate([*special, *sorted(words - set(special))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer, tokenizer.normalizer = splitter, lower
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def ids(tokenizer: Any) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def tower(sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_size": sizes.width,
        "intermediate_size": 2 * sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "image_size": sizes.image,
        "patch_size": sizes.patch,
    }


def spread(sizes: Sizes) -> float:
    """Standard deviation of the weights. The usual 0.02 is for widths near 1000; narrow layers need a larger one."""
    return sizes.width**-0.5


def image_settings(sizes: Sizes) -> dict[str, Any]:
    square = {"height": sizes.image, "width": sizes.image}
    return {"size": square, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False}


def decoder(tokenizer: Any, sizes: Sizes) -> dict[str, Any]:
    """Settings of a decoder-only language model."""
    return {
        **ids(tokenizer),
        "hidden_size": sizes.width,
        "intermediate_size": 2 * sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "max_position_embeddings": 1024,
        "initializer_range": spread(sizes),
    }
