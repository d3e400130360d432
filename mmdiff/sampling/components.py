"""The components of a pipeline, checked before they are used or imported."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from mmdiff.errors import InputError
from mmdiff.model import MTDiffusionModel
from mmdiff.schedulers import SCHEDULERS

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def check_names(given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse keyword arguments that nothing reads.

    Args:
        given: {name: value} beside the declared ones.
        known: all declared names.

    Raises:
        InputError: with the nearest name.
    """
    names = (*known, *HUB_ARGUMENTS)
    for key, value in given.items():
        if key not in HUB_ARGUMENTS:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}"
            raise InputError(key, type(value).__name__, f"unknown argument; {hint}")


def read_index(pipeline: type[DiffusionPipeline], path: str | os.PathLike, **hub: Any) -> dict[str, Any]:
    """`model_index.json` of a folder or a repository; nothing that it names is imported.

    Raises:
        InputError: where there is none, and where it describes another pipeline.
    """
    try:
        index = pipeline.load_config(path, **hub)
    except OSError as error:
        raise InputError("pipeline", str(path), f"holds no pipeline: {str(error).splitlines()[0]}") from None
    for name, known in (("model", (MTDiffusionModel,)), ("scheduler", tuple(SCHEDULERS.values()))):
        homes = [[component.__module__, component.__name__] for component in known]
        if index.get(name) not in homes:
            expected = " or ".join(map(str, homes))
            remedy = f"is no mmdiff pipeline; expected {expected}"
            raise InputError(f"model_index.json: {name}", index.get(name), remedy)
    return index


def check_components(model: Any, autoencoder: Any) -> None:
    """Refuse networks of another kind.

    Raises:
        InputError: naming the component.
    """
    if not isinstance(getattr(model, "_orig_mod", model), MTDiffusionModel):  # where torch.compile wrapped it
        raise InputError("model", type(model).__name__, "needs an MTDiffusionModel")
    if autoencoder is not None and not isinstance(autoencoder, nn.Module):
        raise InputError("autoencoder", type(autoencoder).__name__, "needs an AutoencoderKL")
