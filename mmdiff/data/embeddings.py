"""Frozen CLIP image embeddings as a column of a data set, computed once and cached on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor

from mmdiff.clip import LOCAL_FOLDER, image_tower, load_clip
from mmdiff.errors import InputError

CACHED = "__embedding__"  # name of the column in the cache


def add_embeddings(
    rows: datasets.Dataset,
    column: str,
    image_column: str,
    model: str,
    pretrained: str | None = None,
    batch_size: int = 64,
    device: str | None = None,
) -> datasets.Dataset:
    """The rows with a column of image embeddings, float32, not normalised; None for missing images.

    A later call with the same rows and weights reads the cache and builds no model.

    Args:
        rows: any data set.
        column: name of the new column.
        image_column: a column of images.
        model, pretrained, device: as of `mmdiff.clip.load_clip`.
        batch_size: images per evaluation of the network.

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
        present = [_decoded(image) for image in images if image is not None]
        vectors = iter(tower()(present).cpu().numpy() if present else ())
        return {CACHED: [None if image is None else next(vectors) for image in images]}

    fingerprint = _fingerprint(rows, image_column, model, pretrained)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "mmdiff-embeddings"
    folder.mkdir(parents=True, exist_ok=True)
    embedded = rows.select_columns([image_column]).map(  # writes a temporary file and renames it
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
    """A stored image as a PIL image."""
    return datasets.Image().decode_example(image) if isinstance(image, Mapping) else image


def _fingerprint(rows: datasets.Dataset, image_column: str, model: str, pretrained: str | None) -> str:
    """A hash of the images, the model and its weights; of local weights their bytes count, not their path."""
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
