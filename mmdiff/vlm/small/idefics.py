"""Small Idefics3 and SmolVLM."""

from __future__ import annotations

from typing import Any

from mmdiff.vlm.small.parts import IMAGE, Sizes, decoder, spread, tower

MARKS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


def idefics3(tokenizer: Any, sizes: Sizes, more: dict[str, Any]) -> Any:
    """With Llama."""
    from transformers import Idefics3Config, Idefics3VisionConfig

    return _made(Idefics3Config, Idefics3VisionConfig, tokenizer, sizes, more)


def smolvlm(tokenizer: Any, sizes: Sizes, more: dict[str, Any]) -> Any:
    """With Llama, and the processor of Idefics3: its own reads images alike, but needs num2words for videos."""
    from transformers import SmolVLMConfig
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

    return _made(SmolVLMConfig, SmolVLMVisionConfig, tokenizer, sizes, more)


def _made(whole: Any, vision: Any, tokenizer: Any, sizes: Sizes, more: dict[str, Any]) -> Any:
    from transformers import Idefics3ImageProcessor, Idefics3Processor, LlamaConfig

    tokenizer.add_tokens(list(MARKS), special_tokens=True)
    config = whole(
        vision_config=vision(**tower(sizes), initializer_range=spread(sizes)),
        text_config=LlamaConfig(**decoder(tokenizer, sizes)),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        scale_factor=2,
        **more,
    )
    images = Idefics3ImageProcessor(
        size={"longest_edge": 2 * sizes.image},
        max_image_size={"longest_edge": sizes.image},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return config, Idefics3Processor(images, tokenizer, image_seq_len=(sizes.image // sizes.patch // 2) ** 2)
