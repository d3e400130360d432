"""The architectures that a fusion can stand in, by their model type in transformers."""

from __future__ import annotations

from mmdiff.vlm.architecture import Architecture
from mmdiff.vlm.blip import Blip2
from mmdiff.vlm.idefics import Idefics3
from mmdiff.vlm.llava import Llava, LlavaOnevision
from mmdiff.vlm.qwen import Qwen3Vl

ARCHITECTURES: dict[str, type[Architecture]] = {
    "blip-2": Blip2,
    "llava": Llava,
    "llava_onevision": LlavaOnevision,
    "idefics3": Idefics3,
    "smolvlm": Idefics3,
    "qwen3_vl": Qwen3Vl,
    "qwen3_vl_moe": Qwen3Vl,
    "qwen3_5": Qwen3Vl,
    "qwen3_5_moe": Qwen3Vl,
    "qwen4_exp": Qwen3Vl,
}
