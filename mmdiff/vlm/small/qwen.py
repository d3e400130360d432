"""Small Qwen3-VL, Qwen3.5 and Qwen4-Exp."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mmdiff.vlm.small.parts import Sizes, decoder, spread, tower

IMAGE, VIDEO, BEGIN, FINISH = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"


def byte_tokenizer(texts: Iterable[str]) -> Any:
    """Byte pairs, merged until every word is one token: transformers loads no other tokenizer for Qwen3.5."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

    empty = Qwen3_5Tokenizer(eos_token="<|im_end|>", padding_side="left")
    words = [text.lower() for text in texts]
    alphabet = ByteLevel.alphabet()
    merges = sum(len(word) for word in {*" ".join(words).split()})  # more than there can be
    return empty.train_new_from_iterator(
        words, len(alphabet) + 2 * merges, initial_alphabet=sorted(alphabet), min_frequency=1, show_progress=False
    )


def qwen3_vl(tokenizer: Any, sizes: Sizes, more: dict[str, Any]) -> Any:
    """With DeepStack from the first layer."""
    from transformers import Qwen3VLConfig, Qwen3VLTextConfig, Qwen3VLVisionConfig

    _add_marks(tokenizer)
    text = Qwen3VLTextConfig(**_decoder(tokenizer, sizes))
    vision = Qwen3VLVisionConfig(**_vision(sizes), deepstack_visual_indexes=[0])
    return Qwen3VLConfig(text_config=text, vision_config=vision, **_marks(tokenizer), **more), _reader(tokenizer, sizes)


def qwen3_5(tokenizer: Any, sizes: Sizes, more: dict[str, Any]) -> Any:
    """Every layer but the last has linear attention."""
    from transformers import Qwen3_5Config, Qwen3_5TextConfig, Qwen3_5VisionConfig

    _add_marks(tokenizer)
    text = Qwen3_5TextConfig(**_decoder(tokenizer, sizes), **_linear(sizes, "full_attention"))
    vision = Qwen3_5VisionConfig(**_vision(sizes))
    return Qwen3_5Config(text_config=text, vision_config=vision, **_marks(tokenizer), **more), _reader(tokenizer, sizes)


def qwen4_exp(tokenizer: Any, sizes: Sizes, more: dict[str, Any]) -> Any:
    """As Qwen3.5, with four experts of which two are asked."""
    from transformers import Qwen4ExpConfig
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig, Qwen4ExpVisionConfig

    _add_marks(tokenizer)
    settings = _decoder(tokenizer, sizes) | _linear(sizes, "indexed_attention")
    settings["moe_intermediate_size"] = settings["shared_expert_intermediate_size"] = settings.pop("intermediate_size")
    indexer = {"n_heads": sizes.heads, "kv_heads": 1, "head_dim": settings["head_dim"]}
    indexer |= {"budget": 1024, "compress_ratio": 4}
    settings |= {f"indexer_{name}": value for name, value in indexer.items()}
    text = Qwen4ExpTextConfig(**settings, num_experts=4, num_experts_per_tok=2, hc_count=2, hc_lowrank=4)
    parts = {"text_config": text, "vision_config": Qwen4ExpVisionConfig(**_vision(sizes))}
    return Qwen4ExpConfig(**parts, **_marks(tokenizer), **more), _reader(tokenizer, sizes)


def _linear(sizes: Sizes, last: str) -> dict[str, Any]:
    """Settings of linear attention in every layer but the last."""
    head = sizes.width // sizes.heads
    return {
        "partial_rotary_factor": 1.0,
        "layer_types": ["linear_attention"] * (sizes.layers - 1) + [last],
        "linear_key_head_dim": head,
        "linear_value_head_dim": head,
        "linear_num_key_heads": sizes.heads,
        "linear_num_value_heads": sizes.heads,
    }


def _add_marks(tokenizer: Any) -> None:
    tokenizer.add_tokens([IMAGE, VIDEO, BEGIN, FINISH], special_tokens=True)


def _marks(tokenizer: Any) -> dict[str, int]:
    names = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    names |= {"vision_start_token_id": BEGIN, "vision_end_token_id": FINISH}
    return {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in names.items()}


def _decoder(tokenizer: Any, sizes: Sizes) -> dict[str, Any]:
    """Half of a head's features turn by time, a quarter each by row and column."""
    head = sizes.width // sizes.heads
    pairs = head // 2
    sections = [pairs - 2 * (pairs // 4), pairs // 4, pairs // 4]
    rotary = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections, "mrope_interleaved": True}
    return decoder(tokenizer, sizes) | {"head_dim": head, "rope_parameters": rotary}


def _vision(sizes: Sizes) -> dict[str, Any]:
    settings = tower(sizes)
    settings |= {"num_heads": settings.pop("num_attention_heads"), "depth": settings.pop("num_hidden_layers")}
    settings |= {"num_position_embeddings": (settings.pop("image_size") // sizes.patch) ** 2}
    return settings | {"out_hidden_size": sizes.width, "initializer_range": spread(sizes)}


def _reader(tokenizer: Any, sizes: Sizes) -> Any:
    """Of as many pixels as a square of ``sizes.image`` has, in the photo's shape."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    settings = {"patch_size": sizes.patch, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    settings["size"] = {"shortest_edge": sizes.image**2, "longest_edge": sizes.image**2}
    return Qwen3VLProcessor(Qwen2VLImageProcessor(**settings), tokenizer, Qwen3VLVideoProcessor(**settings))
