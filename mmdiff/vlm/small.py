"""Small vision-language models of transformers' classes with random weights, which train on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mmdiff.errors import InputError
from mmdiff.vlm.architectures import ARCHITECTURES

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


def make_small(
    folder: str | Path, kind: str, texts: Iterable[str], sizes: Sizes | None = None, seed: int = 0, **more: Any
) -> None:
    """Write a model and its processor to a folder for `VisionLanguageModel.from_pretrained`.

    Args:
        folder: a new one.
        kind: a key of `SMALL`: "blip-2" (OPT), "blip-2-t5" or "llava" (CLIP and Llama).
        texts: whose words are the vocabulary, in lower case.
        sizes: of the model.
        seed: of the weights.
        more: settings of the model's config.

    Raises:
        InputError: for another kind.
    """
    import transformers

    if kind not in SMALL:
        raise InputError("kind", kind, f"choose one of {', '.join(SMALL)}")
    sizes = sizes or Sizes()
    tokenizer = _tokenizer(texts)
    config, processor = SMALL[kind](tokenizer, sizes, more)
    architecture = ARCHITECTURES[config.model_type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, architecture.model_class)(config)
        for name, parameter in model.named_parameters():
            if name == "query_tokens":  # zeros otherwise, and equal queries stay equal
                nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _tokenizer(texts: Iterable[str]) -> Any:
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


def _ids(tokenizer: Any) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _tower(sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_size": sizes.width,
        "intermediate_size": 2 * sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "image_size": sizes.image,
        "patch_size": sizes.patch,
    }


def _spread(sizes: Sizes) -> float:
    """Standard deviation of the weights. The usual 0.02 is for widths near 1000; narrow layers need a larger one."""
    return sizes.width**-0.5


def _image_settings(sizes: Sizes) -> dict[str, Any]:
    square = {"height": sizes.image, "width": sizes.image}
    return {"size": square, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False}


def _opt(tokenizer: Any, sizes: Sizes) -> Any:
    from transformers import OPTConfig

    return OPTConfig(
        **_ids(tokenizer),
        hidden_size=sizes.width,
        word_embed_proj_dim=sizes.width,
        ffn_dim=2 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=256,
        dropout=0.0,
        init_std=_spread(sizes),
    )


def _t5(tokenizer: Any, sizes: Sizes) -> Any:
    from transformers import T5Config

    return T5Config(
        **_ids(tokenizer),
        decoder_start_token_id=tokenizer.pad_token_id,
        d_model=sizes.width,
        d_kv=sizes.width // sizes.heads,
        d_ff=2 * sizes.width,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        dropout_rate=0.0,
    )


def _blip2(language: Callable[[Any, Sizes], Any], tokenizer: Any, sizes: Sizes, more: dict[str, Any]) -> Any:
    from transformers import Blip2Config, Blip2Processor, Blip2QFormerConfig, Blip2VisionConfig, BlipImageProcessor

    queries = Blip2QFormerConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        cross_attention_frequency=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=_spread(sizes),
    )
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**_tower(sizes), initializer_range=_spread(sizes)),
        qformer_config=queries,
        text_config=language(tokenizer, sizes),
        num_query_tokens=sizes.queries,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        **more,
    )
    images = BlipImageProcessor(**_image_settings(sizes))
    return config, Blip2Processor(images, tokenizer, num_query_tokens=sizes.queries)


def _llava(tokenizer: Any, sizes: Sizes, more: dict[str, Any]) -> Any:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

    language = LlamaConfig(
        **_ids(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=256,
        initializer_range=_spread(sizes),
    )
    settings = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"} | more
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_tower(sizes), projection_dim=sizes.width),
        text_config=language,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(sizes.image // sizes.patch) ** 2,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(**_image_settings(sizes)),
        tokenizer,
        patch_size=sizes.patch,
        vision_feature_select_strategy=settings["vision_feature_select_strategy"],
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
    return config, processor


SMALL: dict[str, Callable[[Any, Sizes, dict[str, Any]], Any]] = {
    "blip-2": lambda *arguments: _blip2(_opt, *arguments),
    "blip-2-t5": lambda *arguments: _blip2(_t5, *arguments),
    "llava": _llava,
}
