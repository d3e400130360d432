"""Checks of a pipeline's components before they are imported or used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from mmdiff.errors import InputError
from mmdiff.modalities.autoencoder import find_autoencoder
from mmdiff.model import MTDiffusionModel
from mmdiff.schedulers import SCHEDULERS, MTScheduler

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def read_index(pipeline: type[DiffusionPipeline], path: str | os.PathLike, **hub: Any) -> dict[str, Any]:
    """`model_index.json` of a folder or a repository; nothing that it names is imported.

    Raises:
        InputError: if it is missing or describes another pipeline.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError("pipeline", path, "needs a folder or the name of a repository")
    try:
        index = pipeline.load_config(path, **hub)
    except (OSError, ValueError) as error:
        raise InputError("pipeline", str(path), f"holds no pipeline: {str(error).splitlines()[0]}") from None
    if not isinstance(index, Mapping):
        raise InputError("model_index.json", index, "needs {component: class}")
    for name, known in (("model", (MTDiffusionModel,)), ("scheduler", tuple(SCHEDULERS.values()))):
        classes = [[component.__module__, component.__name__] for component in known]
        if index.get(name) not in classes:
            expected = " or ".join(map(str, classes))
            remedy = f"is no mmdiff pipeline; expected {expected}"
            raise InputError(f"model_index.json: {name}", index.get(name), remedy)
    return index


def check_components(model: Any, autoencoder: Any) -> None:
    """Refuse networks of another class.

    Raises:
        InputError: naming the component.
    """
    if not isinstance(getattr(model, "_orig_mod", model), MTDiffusionModel):  # torch.compile wraps it
        raise InputError("model", type(model).__name__, "needs an MTDiffusionModel")
    network = getattr(autoencoder, "_orig_mod", autoencoder)
    if network is not None and not isinstance(network, find_autoencoder(type(network).__name__)):
        raise InputError("autoencoder", type(network).__name__, "needs an autoencoder of diffusers")


def check_together(model: MTDiffusionModel, scheduler: MTScheduler | None, **others: Any) -> None:
    """Refuse a scheduler with weights of a modality that the model cannot aggregate.

    Args:
        model, scheduler: of a pipeline; without a scheduler nothing is checked.
        others: further components, ignored.

    Raises:
        InputError: naming the component, or the entry of the scheduler's weights.
    """
    check_components(model, None)
    for name, entry in (scheduler.config.weights or {}).items() if scheduler is not None else ():
        if name not in model.auxiliary:
            remedy = f"is no auxiliary modality of the model; these are: {', '.join(model.auxiliary) or 'none'}"
            raise InputError(f"weights.{name}", dict(entry), remedy)
