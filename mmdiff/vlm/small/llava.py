"""Small LLaVA and LLaVA-OneVision."""

from __future__ import annotations

from typing import Any

from mmdiff.vlm.small.parts import IMAGE, Sizes, decoder, ids, image_settings, spread, tower

VIDEO = "<video>"


def llava(tokenizer: Any, sizes: Sizes, more: dict[str, Any]) -> Any:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

    language = LlamaConfig(
        **ids(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=256,
        initializer_range=spread(sizes),
    )
    settings = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"} | more
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower(sizes), projection_dim=sizes.width),
        text_config=language,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(sizes.image // sizes.patch) ** 2,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(**image_settings(sizes)),
        tokenizer,
        patch_size=sizes.patch,
        vision_feature_select_strategy=settings["vision_feature_select_strategy"],
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
    return config, processor


def llava_onevision(tokenizer: Any, sizes: Sizes, more: dict[str, Any]) -> Any:
    """SigLIP and Qwen2."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokenizer.add_tokens([VIDEO], special_tokens=True)
    settings = image_settings(sizes)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**tower(sizes), vision_use_head=False),
        text_config=Qwen2Config(**decoder(tokenizer, sizes)),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO),
        image_grid_pinpoints=[[sizes.image, sizes.image], [sizes.image, 2 * sizes.image]],
        **more,
    )
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(**settings, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(**settings),
        num_image_tokens=(sizes.image // sizes.patch) ** 2,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=IMAGE,
        video_token=VIDEO,
    )
    return config, processor
