"""The architectures that a fusion can stand in, by their model type in transformers."""

from __future__ import annotations

from pathlib import Path

from mmdiff.errors import InputError
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


def architecture_of(name: str | Path) -> type[Architecture]:
    """Of a model by hub name or folder.

    Raises:
        InputError: if its config cannot be loaded, or is of another architecture.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise unloadable(name, error) from error
    return architecture(config.model_type)


def architecture(model_type: str) -> type[Architecture]:
    """Of a model type of transformers.

    Raises:
        InputError: for another one.
    """
    if model_type not in ARCHITECTURES:
        raise InputError("model", model_type, f"is none of the architectures {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]


def unloadable(name: str | Path, error: Exception) -> InputError:
    """The error as one line."""
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    return InputError("model", str(name), f"cannot be loaded ({reason})")
