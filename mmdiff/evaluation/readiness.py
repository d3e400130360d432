"""Whether an evaluation can run, known before the training that it follows."""

from __future__ import annotations

import itertools
from pathlib import Path

from mmdiff.config import Config, EvaluateConfig
from mmdiff.data import Table
from mmdiff.errors import InputError
from mmdiff.evaluation.judges import complete, find_judge
from mmdiff.evaluation.scorers import scorer
from mmdiff.metrics.clip_zero_shot import KEY, check_captions
from mmdiff.metrics.features import extractor
from mmdiff.metrics.lpips import Perceptual
from mmdiff.modalities import Label
from mmdiff.model import MTDiffusionModel

ROWS = 256  # that are read to see which values are there
_NAMED = ("judges", "features", "lpips", "zero_shot", "masking")


def check_evaluation(
    config: Config, model: MTDiffusionModel, train: Table, validation: Table, trust_judges: bool = False
) -> None:
    """Everything that `evaluate` names exists, loads and fits; only where the config asks for an evaluation.

    Args:
        config: resolved.
        model: that will be evaluated.
        train, validation: real rows.
        trust_judges: import what judges name.

    Raises:
        InputError: naming the key of `evaluate`, or the rows that lack.
    """
    asked, default = config.evaluate, EvaluateConfig()
    if not asked.at_end and all(getattr(asked, key) == getattr(default, key) for key in _NAMED):
        return
    read_out = [n for n in model.auxiliary if scorer(model.modalities[n]) and n not in model.filling]
    for name in asked.judges:
        if name not in read_out:
            raise InputError(f"evaluate.judges.{name}", asked.judges[name], f"can be judged: {', '.join(read_out)}")
    if asked.lpips.backbone or asked.lpips.heads:
        lpips = asked.lpips
        Perceptual(lpips.net, *(Path(file) if file else None for file in (lpips.backbone, lpips.heads)))
    _check_zero_shot(config, model, read_out)
    if asked.at_end or asked.judges or asked.features != default.features:
        _check_rows(config, model, train, validation, read_out, trust_judges)


def _check_zero_shot(config: Config, model: MTDiffusionModel, read_out: list[str]) -> None:
    asked = config.evaluate.zero_shot
    if asked is None:
        return
    labels = [name for name in read_out if isinstance(model.modalities[name], Label)]
    if not labels:
        raise InputError(KEY, asked.model, "classifies labels; the config has none")
    for name in labels:
        names, count = asked.names or model.modalities[name].names, model.modalities[name].num_classes
        check_captions(asked.model, names, asked.template)
        if len(names) != count:
            raise InputError(f"{KEY}.names", names, f"needs {count} names, one per class of {name}")


def _check_rows(
    config: Config, model: MTDiffusionModel, train: Table, validation: Table, read_out: list[str], trust_judges: bool
) -> None:
    """The rows that judges and scores need: what a few rows lack is believed where there are no more."""
    real, held_out = (table.all(min(ROWS, config.evaluate.max_rows)) for table in (train, validation))
    whole = [min(len(t), config.evaluate.max_rows) <= ROWS for t in (train, validation)]
    anchor = model.anchor
    conditions = [name for name in model.auxiliary if name not in model.generated]
    groups = [(anchor,), *((anchor, name) for name in read_out), *((name, *read_out) for name in conditions)]
    if whole[1]:
        for names in groups:
            complete(held_out, *names)
    for name in itertools.chain(read_out):
        labelled = isinstance(model.modalities[name], Label)
        if name in config.evaluate.judges or (labelled and whole[0]):
            find_judge(config, model, name, real, trust_judges)
    if whole[0] or real.present[anchor].sum() >= 2:
        images = complete(real, anchor)[0]
        if whole[0] and len(images) < 4:
            raise InputError("data", len(images), "training rows; FID and KID need four at least")
        extractor(config.evaluate.features, images)(images[:2])
