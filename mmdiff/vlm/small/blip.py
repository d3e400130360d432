"""Small BLIP-2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmdiff.vlm.small.parts import IMAGE, Sizes, ids, image_settings, spread, tower


def opt(tokenizer: Any, sizes: Sizes) -> Any:
    from transformers import OPTConfig

    return OPTConfig(
        **ids(tokenizer),
        hidden_size=sizes.width,
        word_embed_proj_dim=sizes.width,
        ffn_dim=2 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=256,
        dropout=0.0,
        init_std=spread(sizes),
    )


def t5(tokenizer: Any, sizes: Sizes) -> Any:
    from transformers import T5Config

    return T5Config(
        **ids(tokenizer),
        decoder_start_token_id=tokenizer.pad_token_id,
        d_model=sizes.width,
        d_kv=sizes.width // sizes.heads,
        d_ff=2 * sizes.width,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        dropout_rate=0.0,
    )


def blip2(language: Callable[[Any, Sizes], Any], tokenizer: Any, sizes: Sizes, more: dict[str, Any]) -> Any:
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
        initializer_range=spread(sizes),
    )
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**tower(sizes), initializer_range=spread(sizes)),
        qformer_config=queries,
        text_config=language(tokenizer, sizes),
        num_query_tokens=sizes.queries,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        **more,
    )
    images = BlipImageProcessor(**image_settings(sizes))
    return config, Blip2Processor(images, tokenizer, num_query_tokens=sizes.queries)
