"""Frozen CLIP image embeddings as a column of a data set, computed once and cached on disk."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from mmdiff.errors import InputError
from mmdiff.trust import offline

CACHED = "__embedding__"  # the column's name in the cache, which serves any name
LOCAL_FOLDER = "local-dir:"
_CONFIG = "open_clip_config.json"
_CODE = {"auto_map", "trust_remote_code", "code_revision", "custom_pipelines", "custom_generate"}
_READ_BY_TRANSFORMERS = ("config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_TOKENIZER = {"clean", "strip_sep_token"}  # arguments of a tokenizer that run nothing; trust_remote_code is none
CARRY_WEIGHTS = ("hf-hub:", LOCAL_FOLDER)  # names of models that open_clip finds together with their weights


def add_embeddings(
    rows: datasets.Dataset,
    column: str,
    image_column: str,
    model: str,
    pretrained: str | None = None,
    batch_size: int = 64,
    device: str | None = None,
) -> datasets.Dataset:
    """The rows with one more column: the embedding of each image, float32, not normalised; None where it is missing.

    A later call with the same rows and weights, in this process or another, reads the cache and builds no model.

    Args:
        rows: any data set.
        column: name of the new column.
        image_column: a column of images.
        model: a model of open_clip, "hf-hub:organisation/name", or "local-dir:folder".
        pretrained: a tag of open_clip or a local checkpoint; None with "hf-hub:" and "local-dir:", which carry weights.
        batch_size: images per evaluation of the network.
        device: default: a GPU if there is one.

    Raises:
        InputError: naming data.embeddings.<column>.column, .model or .pretrained.
    """
    key = f"data.embeddings.{column}"
    if column in rows.column_names:
        raise InputError(key, column, "the source has a column of this name already")
    if not isinstance(rows.features.get(image_column), datasets.Image):
        raise InputError(f"{key}.column", image_column, f"no column of images among {', '.join(rows.column_names)}")

    @cache
    def tower() -> Callable[[Sequence[Any]], Tensor]:
        return image_tower(*load_clip(key, model, pretrained, device))

    def embed(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        images = batch[image_column]
        found = [_decoded(image) for image in images if image is not None]
        vectors = iter(tower()(found).cpu().numpy() if found else ())
        return {CACHED: [None if image is None else next(vectors) for image in images]}

    fingerprint = _fingerprint(rows, image_column, model, pretrained)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "mmdiff-embeddings"
    folder.mkdir(parents=True, exist_ok=True)
    embedded = rows.select_columns([image_column]).map(  # writes to a temporary name and renames: safe for rivals
        embed,
        batched=True,
        batch_size=batch_size,
        remove_columns=[image_column],
        features=datasets.Features({CACHED: datasets.List(datasets.Value("float32"))}),
        new_fingerprint=fingerprint,
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        desc=f"Embedding {image_column} with {model}",
    )
    return datasets.concatenate_datasets([rows, embedded.rename_column(CACHED, column)], axis=1, split=rows.split)


def _decoded(image: Any) -> Any:
    """A PIL image of one that rows hold as it is stored."""
    return datasets.Image().decode_example(image) if isinstance(image, Mapping) else image


def load_clip(
    key: str, model: str, pretrained: str | None, device: str | torch.device | None = None
) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """A pretrained model of open_clip in evaluation mode and its preprocessing, PIL image -> (3, H, W).

    Args:
        key: of the config, for errors.
        model, pretrained, device: as in `add_embeddings`.

    Raises:
        InputError: naming <key>.model or <key>.pretrained.
    """
    import open_clip

    _check_names(key, model, pretrained)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        clip, preprocess = open_clip.create_model_from_pretrained(model, pretrained, device=device)
    except Exception as error:  # downloads and checkpoints fail in many ways; the person needs one line
        culprit, value = (f"{key}.pretrained", pretrained) if pretrained else (f"{key}.model", model)
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(culprit, value, f"the weights of {model} cannot be loaded ({reason})") from error
    return clip.eval().requires_grad_(False), preprocess


def _check_names(key: str, model: str, pretrained: str | None) -> None:
    import open_clip

    if model.startswith(CARRY_WEIGHTS):
        if pretrained is not None:
            raise InputError(f"{key}.pretrained", pretrained, f"must be null, {model} carries its own weights")
        _check_config(f"{key}.model", model)
        return
    known = model.replace("/", "-")  # as open_clip does
    if open_clip.get_model_config(known) is None:
        near = difflib.get_close_matches(known, open_clip.list_models(), n=3, cutoff=0)
        raise InputError(f"{key}.model", model, f"no model of open_clip; the nearest are {', '.join(near)}")
    if pretrained is None or not (open_clip.get_pretrained_cfg(known, pretrained) or Path(pretrained).is_file()):
        tags = open_clip.list_pretrained_tags_by_model(known)
        near = difflib.get_close_matches(pretrained or "", tags, n=5, cutoff=0) or ["it has none"]
        remedy = f"neither a checkpoint file nor a tag of {model} ({', '.join(near)})"
        raise InputError(f"{key}.pretrained", pretrained, remedy)
    found = open_clip.get_pretrained_cfg(known, pretrained) or {}
    if offline() and not Path(pretrained).is_file() and not found.get("hf_hub"):
        raise InputError(f"{key}.pretrained", pretrained, "would be downloaded; name a local checkpoint file")


def _check_config(key: str, model: str) -> None:
    """The config of a model from elsewhere asks neither for remote code nor for a further place."""
    try:
        if model.startswith(LOCAL_FOLDER):
            path = Path(model.removeprefix(LOCAL_FOLDER)) / _CONFIG
            beside = sorted(path.parent.glob("*.json"))
        else:
            path = Path(hf_hub_download(model.removeprefix(CARRY_WEIGHTS[0]), _CONFIG))
            beside = [path, *_of_transformers(model.removeprefix(CARRY_WEIGHTS[0]))]
        for file in beside:
            _refuse_code(key, model, file)
        config = json.loads(path.read_text())
        config = config.get("model_cfg", config)
        text, vision = config.get("text_cfg", {}), config.get("vision_cfg", {})
        asked = {**text.get("tokenizer_kwargs", {})}
        places = [text.get("hf_tokenizer_name"), text.get("hf_model_name"), vision.get("timm_model_name")]
    except InputError:
        raise
    except Exception as error:  # downloads and files fail in many ways; the person needs one line
        raise InputError(key, model, f"its {_CONFIG} cannot be loaded ({type(error).__name__})") from error
    for name in sorted(set(asked) - _TOKENIZER):
        raise InputError(key, model, f"its {_CONFIG} passes {name!r} to the tokenizer; only {_TOKENIZER} may be set")
    for place in filter(None, places):
        if not _HUB_NAME.fullmatch(str(place)) or Path(str(place)).exists():
            raise InputError(key, model, f"its {_CONFIG} names a further place, {place!r}; that is not followed")


def _of_transformers(repository: str) -> list[Path]:
    """The files of a repository from which transformers would take a tokenizer."""
    found = []
    for name in _READ_BY_TRANSFORMERS:
        with contextlib.suppress(EntryNotFoundError):
            found.append(Path(hf_hub_download(repository, name)))
    return found


def _refuse_code(key: str, model: str, file: Path) -> None:
    """Refuse a JSON file that names code, at any depth and however its names are spelled."""
    try:
        inner = [json.loads(file.read_text())]
    except (ValueError, RecursionError):
        raise InputError(key, model, f"cannot be loaded, its {file.name} is no JSON") from None
    while inner:
        value = inner.pop()
        if isinstance(value, dict):
            for name in sorted(name for name in _CODE & set(value) if value[name]):
                raise InputError(key, model, f"its {file.name} names remote code ({name!r}), which is never run")
        inner += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def image_tower(clip: nn.Module, preprocess: Callable[[Any], Tensor]) -> Callable[[Sequence[Any]], Tensor]:
    """A function of n PIL images: their embeddings (n, D), float32, not normalised."""
    device = next(clip.parameters()).device

    @torch.no_grad()
    def embed(images: Sequence[Any]) -> Tensor:
        pixels = torch.stack([preprocess(image) for image in images]).to(device)  # (n, 3, H, W)
        with torch.autocast(device.type, enabled=False):
            return clip.encode_image(pixels, normalize=False).float()

    return embed


def _fingerprint(rows: datasets.Dataset, image_column: str, model: str, pretrained: str | None) -> str:
    """The same for the same images, model and weights; local weights count by their bytes and not by their place."""
    parts = [rows._fingerprint, image_column]
    if model.startswith(LOCAL_FOLDER):
        files = sorted(path for path in Path(model.removeprefix(LOCAL_FOLDER)).glob("*") if path.is_file())
        parts += [f"{path.name} {_digest(path)}" for path in files]
    else:
        local = pretrained is not None and Path(pretrained).is_file()
        parts += [model, _digest(Path(pretrained)) if local else str(pretrained)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
