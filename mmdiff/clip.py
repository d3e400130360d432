"""Loading of pretrained open_clip models, for embeddings, image encoders and zero-shot labels."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from mmdiff.errors import InputError
from mmdiff.trust import offline

LOCAL_FOLDER, HUB = "local-dir:", "hf-hub:"  # prefixes of models that come with their weights
_CONFIG = "open_clip_config.json"
_CODE = {"auto_map", "trust_remote_code", "code_revision", "custom_pipelines", "custom_generate"}
_READ_BY_TRANSFORMERS = ("config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_TOKENIZER = {"clean", "strip_sep_token"}  # tokenizer arguments that run no code


def load_clip(
    key: str, model: str, pretrained: str | None, device: str | torch.device | None = None
) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """A pretrained model in evaluation mode, and its preprocessing, PIL image -> (3, H, W).

    Args:
        key: prefix of the config keys, for errors.
        model: a model of open_clip, "hf-hub:organisation/name", or "local-dir:folder".
        pretrained: a tag of open_clip or a local checkpoint; None with "hf-hub:" and "local-dir:".
        device: default: a GPU if there is one.

    Raises:
        InputError: naming <key>.model or <key>.pretrained.
    """
    import open_clip

    if model.startswith((LOCAL_FOLDER, HUB)):
        if pretrained is not None:
            raise InputError(f"{key}.pretrained", pretrained, f"must be null, {model} carries its own weights")
        _check_config(f"{key}.model", model)
    else:
        check_listed(f"{key}.model", model)
        _check_weights(f"{key}.pretrained", model, pretrained)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        clip, preprocess = open_clip.create_model_from_pretrained(model, pretrained, device=device)
    except Exception as error:  # downloads and checkpoints fail in many ways
        culprit, value = (f"{key}.pretrained", pretrained) if pretrained else (f"{key}.model", model)
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(culprit, value, f"the weights of {model} cannot be loaded ({reason})") from error
    return clip.eval().requires_grad_(False), preprocess


def image_tower(clip: nn.Module, preprocess: Callable[[Any], Tensor]) -> Callable[[Sequence[Any]], Tensor]:
    """A function of n PIL images: their embeddings (n, D), float32, not normalised."""
    device = next(clip.parameters()).device

    @torch.no_grad()
    def embed(images: Sequence[Any]) -> Tensor:
        pixels = torch.stack([preprocess(image) for image in images]).to(device)  # (n, 3, H, W)
        with torch.autocast(device.type, enabled=False):
            return clip.encode_image(pixels, normalize=False).float()

    return embed


def check_listed(key: str, model: str) -> None:
    """Refuse a name that open_clip does not list.

    Raises:
        InputError: with the nearest names.
    """
    import open_clip

    name, models = model.replace("/", "-"), open_clip.list_models()  # open_clip replaces it too
    if name not in models:
        near = difflib.get_close_matches(name, models, n=3, cutoff=0)
        raise InputError(key, model, f"no model of open_clip; the nearest are {', '.join(near)}")


def _check_weights(key: str, model: str, pretrained: str | None) -> None:
    import open_clip

    if pretrained is not None and Path(pretrained).is_file():
        return
    tag = open_clip.get_pretrained_cfg(model.replace("/", "-"), pretrained or "")
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(model.replace("/", "-"))
        near = difflib.get_close_matches(pretrained or "", tags, n=5, cutoff=0) or ["it has none"]
        raise InputError(key, pretrained, f"neither a checkpoint file nor a tag of {model} ({', '.join(near)})")
    if offline() and not tag.get("hf_hub"):
        raise InputError(key, pretrained, "would be downloaded; name a local checkpoint file")


def _check_config(key: str, model: str) -> None:
    """Refuse a folder or repository whose config names code or a further folder or repository."""
    try:
        if model.startswith(LOCAL_FOLDER):
            path = Path(model.removeprefix(LOCAL_FOLDER)) / _CONFIG
            files = sorted(path.parent.glob("*.json"))
        else:
            path = Path(hf_hub_download(model.removeprefix(HUB), _CONFIG))
            files = [path, *_tokenizer_files(model.removeprefix(HUB))]
        for file in files:
            _refuse_code(key, model, file)
        config = json.loads(path.read_text())
        config = config.get("model_cfg", config)
        text, vision = config.get("text_cfg", {}), config.get("vision_cfg", {})
        arguments = {**text.get("tokenizer_kwargs", {})}
        places = [text.get("hf_tokenizer_name"), text.get("hf_model_name"), vision.get("timm_model_name")]
    except InputError:
        raise
    except Exception as error:  # downloads and files fail in many ways
        raise InputError(key, model, f"its {_CONFIG} cannot be loaded ({type(error).__name__})") from error
    for name in sorted(set(arguments) - _TOKENIZER):
        raise InputError(key, model, f"its {_CONFIG} passes {name!r} to the tokenizer; only {_TOKENIZER} may be set")
    for place in filter(None, places):
        if not _HUB_NAME.fullmatch(str(place)) or Path(str(place)).exists():
            raise InputError(key, model, f"its {_CONFIG} names a further place, {place!r}; that is not followed")


def _tokenizer_files(repository: str) -> list[Path]:
    """The files of a repository that transformers reads for a tokenizer."""
    files = []
    for name in _READ_BY_TRANSFORMERS:
        with contextlib.suppress(EntryNotFoundError):
            files.append(Path(hf_hub_download(repository, name)))
    return files


def _refuse_code(key: str, model: str, file: Path) -> None:
    """Refuse a JSON file that names code, at any depth and in any spelling."""
    try:
        values = [json.loads(file.read_text())]
    except (ValueError, RecursionError):
        raise InputError(key, model, f"cannot be loaded, its {file.name} is no JSON") from None
    while values:
        value = values.pop()
        if isinstance(value, dict):
            for name in sorted(name for name in _CODE & set(value) if value[name]):
                raise InputError(key, model, f"its {file.name} names remote code ({name!r}), which is never run")
        values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
