"""The composition root: a config becomes data, model, scheduler and objective. Nothing else knows how they fit."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from mmdiff.backbones import BACKBONES
from mmdiff.config import Config
from mmdiff.data import Table, open_splits
from mmdiff.errors import InputError
from mmdiff.modalities import MODALITIES
from mmdiff.model import MTDiffusionModel
from mmdiff.objective import MTObjective, StateLaw
from mmdiff.randomness import fold
from mmdiff.schedulers import MTDiffusionScheduler

_GIVEN = {"self", "shape", "head", "space", "observation_channels", "num_flags"}  # not for a config to set


@dataclass
class Experiment:
    """Everything a run needs; ``config`` is resolved: what the data determine is filled in."""

    config: Config
    train: Table
    validation: Table
    model: MTDiffusionModel
    scheduler: MTDiffusionScheduler
    objective: MTObjective


def build(config: Config) -> Experiment:
    """Open the data, read off what they determine, and build all parts.

    Raises:
        InputError: naming the config key.
    """
    data = config.data
    rows, held_out = open_splits(data.source, data.split, data.validation_split, data.holdout)
    config = resolve(config, rows)
    scheduler = build_scheduler(config)
    model = build_model(config)
    objective = build_objective(config, model, scheduler)
    train, validation = (build_table(config, model, part) for part in (rows, held_out))
    return Experiment(config, train, validation, model, scheduler, objective)


def resolve(config: Config, rows: Any) -> Config:
    """The config with every modality's settings that the data determine: sizes, channels, numbers of classes."""
    modalities = {}
    for name, entry in config.modalities.items():
        if entry.kind not in MODALITIES:
            raise InputError(f"modalities.{name}.kind", entry.kind, f"choose one of {', '.join(sorted(MODALITIES))}")
        column = config.column(name)
        if column not in rows.column_names:
            remedy = f"the source has no such column, but {', '.join(rows.column_names)}; set data.columns.{name}=…"
            raise InputError(f"data.columns.{name}", column, remedy)
        modality = MODALITIES[entry.kind]
        values = (row[column] for row in rows.select_columns([column]))  # decodes only what is asked for
        try:
            found = modality.settings_from_data(rows.features[column], values)
        except InputError as error:
            raise InputError(f"data.columns.{name}={column}: {error.key}", error.value, error.remedy) from None
        settings = {**found, **entry.settings()}
        _check_settings(f"modalities.{name}", modality, settings)
        modalities[name] = entry.model_copy(update=settings)
    _check_settings("backbone", _backbone(config), config.backbone.settings())
    resolved = config.model_dump()
    resolved["modalities"] = {name: entry.model_dump() for name, entry in modalities.items()}
    return Config.model_validate(resolved)


def build_model(config: Config) -> MTDiffusionModel:
    """The model with weights drawn from train.seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(config.train.seed, 0, "weights"))
        return MTDiffusionModel(
            modality_config={n: {"kind": m.kind, **m.settings()} for n, m in config.modalities.items()},
            backbone_config={"kind": config.backbone.kind, **config.backbone.settings()},
            anchor=config.anchor,
        )


def build_scheduler(config: Config) -> MTDiffusionScheduler:
    """The scheduler, with a weight schedule for every auxiliary modality."""
    weights = {name: config.modalities[name].weight.model_dump() for name in config.auxiliary()}
    try:
        return MTDiffusionScheduler(**config.scheduler.model_dump(), weights=weights)
    except InputError as error:
        key = error.key.split(".")
        where = (
            f"modalities.{key[1]}.weight" + "".join(f".{k}" for k in key[2:])
            if key[0] == "weights"
            else f"scheduler.{error.key}"
        )
        raise InputError(where, error.value, error.remedy) from None


def build_objective(config: Config, model: MTDiffusionModel, scheduler: MTDiffusionScheduler) -> MTObjective:
    """The objective, with the law of states that `states` and each modality's own `states` set."""
    learned = [n for n in config.auxiliary() if config.modalities[n].weight.schedule == "learned"]
    return MTObjective(
        model,
        scheduler,
        state_laws={name: state_law(config, name) for name in config.modalities},
        loss_weights={name: config.modalities[name].loss_weight for name in config.auxiliary()},
        terminal_weight=config.loss.terminal,
        min_snr_gamma=config.loss.min_snr_gamma,
        learn_scale=tuple(name for name in learned if config.modalities[name].weight.learn_scale),
        seed=config.train.seed,
    )


def state_law(config: Config, name: str) -> StateLaw:
    """The probabilities of a modality's flags."""
    if config.states.law != "independent":
        weighted = config.states.law == "source" and name != config.anchor
        return StateLaw(aggregated=float(weighted and _has_weight(config, name)), observed=0.0)
    if name == config.anchor:
        return StateLaw(aggregated=0.0, observed=config.states.anchor_observed)
    own = config.modalities[name].states
    aggregated = config.states.aggregated if own.aggregated is None else own.aggregated
    observed = config.states.observed if own.observed is None else own.observed
    return StateLaw(aggregated * _has_weight(config, name), observed)


def build_table(config: Config, model: MTDiffusionModel, rows: Any) -> Table:
    """Rows as batches of the model's values."""
    return Table(
        rows,
        columns={name: config.column(name) for name in model.names},
        preprocess={name: model.modalities[name].preprocess for name in model.names},
        placeholders={name: model.modalities[name].placeholder() for name in model.names},
        cache_mib=config.data.cache_mib,
    )


def _has_weight(config: Config, name: str) -> bool:
    weight = config.modalities[name].weight
    return weight.schedule != "none" and weight.scale > 0


def _backbone(config: Config) -> type:
    if config.backbone.kind not in BACKBONES:
        raise InputError("backbone.kind", config.backbone.kind, f"choose one of {', '.join(sorted(BACKBONES))}")
    return BACKBONES[config.backbone.kind]


def _check_settings(key: str, cls: type, settings: dict[str, Any]) -> None:
    """Settings must be constructor arguments of the class."""
    parameters = {n: p for n, p in inspect.signature(cls.__init__).parameters.items() if n not in _GIVEN}
    for name in settings:
        if name not in parameters:
            known = ", ".join(sorted(parameters))
            raise InputError(f"{key}.{name}", settings[name], f"unknown key; {cls.__name__} takes {known}")
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in settings:
            raise InputError(f"{key}.{name}", None, "is missing and the data do not determine it; add it to the config")
