"""An encoded data set as the rows of an experiment: its settings, and which of its columns are read."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mmdiff.config import Config
from mmdiff.data import Table
from mmdiff.data.encoded import LatentTable, Manifest, latents_of
from mmdiff.errors import InputError
from mmdiff.modalities import Condition
from mmdiff.modalities.autoencoder import digest
from mmdiff.model import MTDiffusionModel

_MEASURED = ("latents_mean", "latents_std")


def encoded_settings(
    config: Config, name: str, kind: type[Condition], settings: dict[str, Any], manifest: Manifest
) -> dict[str, Any]:
    """Settings of a modality, completed from those with which it was encoded.

    Args:
        config: as read.
        name: of the modality.
        kind: its class.
        settings: of the config, the files and the anchor.
        manifest: of the encoded data set.

    Raises:
        InputError: it was not encoded, or with a setting that made other values.
    """
    made, source = manifest.of().modalities, config.data.source
    if not {name, latents_of(name)} & set(manifest.columns):
        remedy = f"{source} was encoded without it, with {', '.join(sorted(made))}; leave it out, or encode again"
        raise InputError(f"modalities.{name}", config.modalities[name].kind, remedy)
    then = {"kind": made[name].kind, **made[name].settings()}
    for key, value in {"kind": config.modalities[name].kind, **settings}.items():
        if key not in kind.free_settings and not _same(then.get(key), value):
            remedy = f"{source} was encoded with {then.get(key)!r}; restore it, or encode again"
            raise InputError(f"modalities.{name}.{key}", value, remedy)
    kept = {key: value for key, value in then.items() if key not in {"kind", *kind.free_settings}}
    if settings.get("latent_scale") == "measured":
        kept |= {key: then[key] for key in _MEASURED if then.get(key) is not None}
    return {**kept, **settings}


def _same(one: Any, other: Any) -> bool:
    """One number stands for both sides of a size."""
    return one == other or [one, one] == other or [other, other] == one


def encoded_table(
    config: Config, model: MTDiffusionModel, manifest: Manifest, latents: bool, arguments: dict[str, Any]
) -> Table:
    """Rows of an encoded data set as batches.

    Args:
        config: resolved.
        model: its modalities say what is read.
        manifest: of the data set.
        latents: whether training visits these rows, which reads the anchor's latents if there are any.
        arguments: of `Table`, for rows that are not encoded.

    Raises:
        InputError: images are needed and are not there, or another autoencoder made the latents.
    """
    names, anchor, source = list(arguments["columns"]), model.anchor, str(config.data.source)
    whole = arguments | {
        "columns": {name: name for name in names},
        "preprocess": {name: manifest.columns[name].load for name in names if name in manifest.columns},
        "is_missing": {},
    }
    changed = arguments["augment"] is not None
    looks = bool(model.filling) or config.loss.repa is not None  # training looks at pixels
    if not manifest.images and (changed or looks or not uses_latents(model, manifest)):
        raise _no_images(source)
    if manifest.images and (changed or not latents or not uses_latents(model, manifest)):
        return Table(**whole)
    if latents:
        _check_autoencoder(config, model, manifest)
    name = latents_of(anchor)
    visited = {key: dict(whole[key]) for key in ("columns", "preprocess", "placeholders")}
    visited["columns"][name], visited["preprocess"][name] = name, manifest.columns[name].load
    visited["placeholders"][name] = torch.zeros(manifest.columns[name].shape)
    if not looks:
        nothing = torch.empty(0, *model.modalities[anchor].value_shape[1:])
        visited["columns"][anchor], visited["preprocess"][anchor] = name, functools.partial(_nothing, nothing)
        visited["placeholders"][anchor] = nothing

    def with_images() -> Table:
        if not manifest.images:
            raise _no_images(source)
        return Table(**whole | {"cache_mib": 0.0})

    return LatentTable(with_images, **(whole | visited))


def uses_latents(model: MTDiffusionModel, manifest: Manifest) -> bool:
    """Whether the anchor can be read as latents."""
    latent = getattr(model.modalities[model.anchor], "latent", False)
    return latent is True and latents_of(model.anchor) in manifest.columns


def _check_autoencoder(config: Config, model: MTDiffusionModel, manifest: Manifest) -> None:
    anchor = model.modalities[model.anchor]
    if digest(anchor.frozen) != manifest.autoencoder:
        key = f"modalities.{model.anchor}.autoencoder"
        remedy = f"is not the autoencoder of the latents in {config.data.source}; restore it, or encode again"
        raise InputError(key, config.modalities[model.anchor].settings().get("autoencoder"), remedy)


def _nothing(nothing: Tensor, raw: object) -> Tensor:
    return nothing


def _no_images(source: str) -> InputError:
    remedy = "was encoded with --no-images; holes, changes and evaluation need them: encode again, or leave these out"
    return InputError("data.source", source, remedy)
