"""What reads a modality off images, independently of the model under test; its own accuracy is always measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdiff.config import Config
from mmdiff.data import RAW_RULES, RULES, Batch
from mmdiff.errors import InputError, at
from mmdiff.metrics.neighbours import Judge as NearestNeighbours
from mmdiff.modalities import Condition, Label, Text
from mmdiff.model import MTDiffusionModel
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.trust import check_links

_BATCH = 256
NEIGHBOURS = 3


class Judge(NamedTuple):
    """``name`` for the manifest; ``read``: images (n, C, H, W) in [−1, 1] -> values of the modality."""

    name: str
    read: Callable[[Tensor], Tensor]


def find_judge(config: Config, model: MTDiffusionModel, name: str, train: Batch, trust: bool) -> Judge | None:
    """The judge of a modality: a run that `evaluate.judges` names, the rule of a procedural data set, or for labels
    3 nearest neighbours; None where there is none.

    Args:
        config: of the run under test.
        model: the same.
        name: of the modality.
        train: real training rows; those that lack the image or the value take no part.
        trust: whether custom modalities of the judging run may be imported.
    """
    if name in config.evaluate.judges:
        return _run(name, Path(config.evaluate.judges[name]), trust)
    source, column, modality = str(config.data.source), config.column(name), model.modalities[name]
    for rule in (RULES.get(source, {}).get(column), _of_raw(RAW_RULES.get(source, {}).get(column), modality)):
        # a column may be read as another kind of value, or at another size, than the rule gives
        if rule is not None and rule(train.values[model.anchor][:1]).shape[1:] == modality.value_shape:
            return Judge(f"the rule of {source}", rule)
    if isinstance(model.modalities[name], Label):
        images, labels = complete(train, model.anchor, name)
        if len(images) < NEIGHBOURS:
            remedy = f"training rows with {name}; its judge needs {NEIGHBOURS} neighbours; add rows or leave it out"
            raise InputError("data", len(images), remedy)
        neighbours = NearestNeighbours(images.numpy(), labels.numpy(), NEIGHBOURS)
        return Judge("3-NN on training pixels", lambda images: torch.from_numpy(neighbours(images.float().numpy())))
    return None


def _of_raw(rule: Callable[[Tensor], list[Any]] | None, modality: Condition) -> Callable[[Tensor], Tensor] | None:
    """A rule of texts, which the modality reads."""
    if rule is None or not isinstance(modality, Text):
        return None
    return lambda images: torch.stack([modality.preprocess(raw) for raw in rule(images)])


def _run(name: str, folder: Path, trust: bool) -> Judge:
    """The read-out of another model, which a run folder holds."""
    key = f"evaluate.judges.{name}"
    if not (folder / "pipeline" / "model_index.json").is_file():
        raise InputError(key, str(folder), "is no finished run folder")
    check_links(key, folder)
    with at(key):
        pipeline = MTDiffusionPipeline.from_pretrained(folder / "pipeline", trust_custom_modalities=trust)
    pipeline.set_progress_bar_config(disable=True)
    model = pipeline.model
    if name not in model.generated:
        raise InputError(key, str(folder), f"does not know {name}, but {', '.join(model.generated)}")

    def read(images: Tensor) -> Tensor:
        parts = [
            pipeline(observed={model.anchor: part.clamp(-1, 1)}, read="mode", output_type="pt").samples[name]
            for part in images.split(_BATCH)
        ]
        return torch.cat(parts)

    return Judge(f"the run {folder.name}", read)


def complete(rows: Batch, *names: str) -> tuple[Tensor, ...]:
    """The values of the rows in which none of the named modalities is missing.

    Raises:
        InputError: fewer than two such rows; a mean of one has no interval.
    """
    present = torch.stack([rows.present[name] for name in names]).all(dim=0)
    if (count := int(present.sum())) < 2:
        remedy = f"rows with {' and '.join(names)}; evaluation needs two at least, held out and in training"
        raise InputError("data", count, remedy)
    return tuple(rows.values[name][present] for name in names)
