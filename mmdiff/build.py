"""The composition root: a config becomes data, model, scheduler and objective. Nothing else knows how they fit."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmdiff.backbones import BACKBONES, Backbone
from mmdiff.config import Config, MaskingConfig, ModalityConfig, WeightConfig, parse_arguments
from mmdiff.data import Holes, Rows, StandIn, Table, open_splits
from mmdiff.data.embeddings import add_embeddings
from mmdiff.data.masking import known_masks
from mmdiff.errors import InputError, at
from mmdiff.modalities import Modality, find_modality
from mmdiff.model import MTDiffusionModel
from mmdiff.objective import MTObjective
from mmdiff.randomness import fold
from mmdiff.schedulers import SCHEDULERS, MTScheduler
from mmdiff.states import LAWS, StateLaw

_GIVEN = {  # not for a config to set
    Modality: {"self", "shape", "head"},
    Backbone: {"self", "space", "observation_channels", "num_flags"},
    MTScheduler: {"self", "weights"},
}


@dataclass
class Experiment:
    """Everything a run needs; ``config`` is resolved: what the data determine is filled in."""

    config: Config
    train: Table | StandIn
    validation: Table | StandIn
    model: MTDiffusionModel
    scheduler: MTScheduler
    objective: MTObjective


def build(config: Config) -> Experiment:
    """Open the data, read off what they determine, and build all parts.

    Raises:
        InputError: naming the config key.
    """
    rows, held_out = open_rows(config)
    config = resolve(config, rows)
    scheduler = build_scheduler(config)
    model = build_model(config)
    objective = build_objective(config, model, scheduler)
    train = build_table(config, model, rows, missing=config.data.missing)
    validation = build_table(config, model, held_out)
    return Experiment(config, train, validation, model, scheduler, objective)


def build_stand_in(config: Config) -> Experiment:
    """The same on random values in place of data, which are not opened: for a dry run.

    Raises:
        InputError: naming a setting that only the data would determine.
    """
    config = resolve(config, None)
    model = build_model(config)
    scheduler = build_scheduler(config)
    table = StandIn({name: modality.examples for name, modality in model.modalities.items()})
    return Experiment(config, table, table, model, scheduler, build_objective(config, model, scheduler))


def needs_data(config: Config) -> bool:
    """Whether a setting is left to the data."""
    for name, entry in config.modalities.items():
        kind = find_modality(entry.kind, f"modalities.{name}.kind")
        if missing_settings(kind, _resolved_settings(config, name, kind, None)):
            return True
    return False


def open_rows(config: Config) -> tuple[Rows, Rows]:
    """(training rows, held-out rows), with the embeddings that are to be computed."""
    data = config.data
    splits = open_splits(data.source, data.split, data.validation_split, data.holdout, data.options)
    for name, encoder in data.embeddings.items():
        column = config.column(name)
        splits = tuple(
            rows
            if column in rows.column_names
            else add_embeddings(rows, column, encoder.column, encoder.model, encoder.pretrained)
            for rows in splits
        )
    return splits


def resolve(config: Config, rows: Rows | None) -> Config:
    """The config with every setting that files and data determine: sizes, channels, numbers of classes.

    Args:
        config: as it was read.
        rows: training rows; None where the config is to stand without data.

    Raises:
        InputError: naming a setting that is unknown, or missing and not determined.
    """
    for name in {*config.data.masking, *config.data.embeddings, *config.data.missing} - set(config.modalities):
        raise InputError("data", name, f"names no modality; choose from {', '.join(sorted(config.modalities))}")
    for name, law in config.data.masking.items():
        _check_holes(f"data.masking.{name}", law)
    modalities = {}
    for name, entry in config.modalities.items():
        kind = find_modality(entry.kind, f"modalities.{name}.kind")
        settings = _resolved_settings(config, name, kind, rows)
        check_settings(f"modalities.{name}", kind, settings)
        modalities[name] = entry.model_copy(update={**settings, "weight": _weight(name, entry, kind)})
    check_settings("backbone", _backbone(config), config.backbone.settings())
    resolved = config.model_dump()
    resolved["modalities"] = {name: entry.model_dump() for name, entry in modalities.items()}
    resolved["scheduler"]["clip_sample"] = _clip_sample(config, modalities)
    return resolve_scheduler(Config.model_validate(resolved))


def resolve_scheduler(config: Config) -> Config:
    """The config with every argument of the scheduler's class, also those that came after the config was written.

    Raises:
        InputError: naming a setting that is unknown or of a wrong type.
    """
    cls, settings = _scheduler(config), config.scheduler.model_dump(exclude={"kind"})
    hints, parameters = typing.get_type_hints(cls.__init__), _parameters(cls)
    arguments = {name: (hints[name], parameter.default) for name, parameter in parameters.items()}
    if settings["clip_sample"] is None:  # left to the anchor
        del settings["clip_sample"], arguments["clip_sample"]
    resolved = config.model_dump()
    resolved["scheduler"] |= parse_arguments("scheduler", arguments, settings)
    return Config.model_validate(resolved)


def _resolved_settings(config: Config, name: str, kind: type[Modality], rows: Rows | None) -> dict[str, Any]:
    """What the config sets, over what files and the data determine."""
    settings = config.modalities[name].settings()
    with at(f"modalities.{name}"):
        settings = {**kind.settings_from_files(**settings), **settings}
    if rows is None:
        return settings
    column = config.column(config.anchor if name in config.data.masking else name)
    if column not in rows.column_names:
        remedy = f"the source has no such column, but {', '.join(rows.column_names)}; set data.columns.{name}=…"
        raise InputError(f"data.columns.{name}", column, remedy)
    values = (row[column] for row in _each(rows.select_columns([column])))  # decodes only what is asked for
    with at(f"data.columns.{name}={column}", ": "):
        return {**kind.settings_from_data(rows.features[column], values, **settings), **settings}


def _check_holes(key: str, law: MaskingConfig) -> None:
    with at(key):
        known_masks(law.law, law.ratio, 32, 32, 0, torch.zeros(1, dtype=torch.int64))


def _each(rows: Rows) -> Iterator[dict[str, Any]]:
    return (rows[index] for index in range(len(rows)))


def _weight(name: str, entry: ModalityConfig, kind: type[Modality]) -> WeightConfig:
    """The weight schedule; one that is never aggregated has none."""
    if kind.aggregable:
        return entry.weight or WeightConfig()
    if entry.weight is not None and entry.weight.schedule != "none":
        raise InputError(
            f"modalities.{name}.weight.schedule",
            entry.weight.schedule,
            f"{kind.__name__} is observed or absent, never aggregated; leave weight out",
        )
    return WeightConfig(schedule="none")


def _clip_sample(config: Config, modalities: dict[str, ModalityConfig]) -> bool:
    anchor = modalities[config.anchor]
    bounded = find_modality(anchor.kind, "").bounded(**anchor.settings())
    if config.scheduler.clip_sample and not bounded:
        raise InputError("scheduler.clip_sample", True, "the anchor's encodings have no bounds; leave it out")
    return bounded if config.scheduler.clip_sample is None else config.scheduler.clip_sample


def build_model(config: Config) -> MTDiffusionModel:
    """The model with weights drawn from train.seed, or read from the files that its settings name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(config.train.seed, 0, "weights"))
        model = MTDiffusionModel(
            modality_config={n: {"kind": m.kind, **m.settings()} for n, m in config.modalities.items()},
            backbone_config={"kind": config.backbone.kind, **config.backbone.settings()},
            anchor=config.anchor,
            observable=[name for name in sorted(config.modalities) if state_law(config, name).observed > 0],
        )
    model.load_initial_weights()
    return model


def build_scheduler(config: Config) -> MTScheduler:
    """The scheduler, with a weight schedule for every auxiliary modality."""
    weights = {
        name: config.modalities[name].weight.model_dump()
        for name in config.auxiliary()
        if find_modality(config.modalities[name].kind, "").aggregable
    }
    try:
        return _scheduler(config)(**config.scheduler.model_dump(exclude={"kind"}), weights=weights)
    except InputError as error:
        key = error.key.split(".")
        where = (
            f"modalities.{key[1]}.weight" + "".join(f".{k}" for k in key[2:])
            if key[0] == "weights"
            else f"scheduler.{error.key}"
        )
        raise InputError(where, error.value, error.remedy) from None


def build_objective(config: Config, model: MTDiffusionModel, scheduler: MTScheduler) -> MTObjective:
    """The objective, with the law of states that `states` and each modality's own `states` set."""
    learned = [n for n in config.auxiliary() if config.modalities[n].weight.schedule == "learned"]
    return MTObjective(
        model,
        scheduler,
        state_laws={name: state_law(config, name) for name in config.modalities},
        loss_weights={name: config.modalities[name].loss_weight for name in model.generated},
        law=config.states.law,
        terminal_weight=config.loss.terminal,
        anchor_hidden=config.states.anchor_hidden,
        min_snr_gamma=config.loss.min_snr_gamma,
        uncertainty=config.loss.uncertainty,
        learn_scale=tuple(name for name in learned if config.modalities[name].weight.learn_scale),
        seed=config.train.seed,
    )


def state_law(config: Config, name: str) -> StateLaw:
    """A modality's probabilities under `states.law`."""
    states, own = config.states, config.modalities[name].states
    if name == config.anchor:
        given = StateLaw(0.0, states.anchor_observed)
    else:
        given = StateLaw(
            states.aggregated if own.aggregated is None else own.aggregated,
            states.observed if own.observed is None else own.observed,
        )
    law = LAWS[states.law].given(given)
    able = name != config.anchor and _has_weight(config, name)
    return law._replace(aggregated=law.aggregated * able)


def build_table(
    config: Config, model: MTDiffusionModel, rows: Rows, missing: Mapping[str, float] | None = None
) -> Table:
    """Rows as batches of the model's values.

    Args:
        config: resolved.
        model: whose modalities read the values.
        rows: of the source.
        missing: {modality: share of rows whose value is hidden}.
    """
    masking = config.data.masking
    return Table(
        rows,
        columns={name: config.column(name) for name in model.names if name not in masking},
        preprocess={name: model.modalities[name].preprocess for name in model.names},
        placeholders={name: model.modalities[name].placeholder() for name in model.names},
        holes={name: Holes(model.anchor, law.law, law.ratio, config.train.seed) for name, law in masking.items()},
        missing=missing,
        seed=config.train.seed,
        cache_mib=config.data.cache_mib,
    )


def _has_weight(config: Config, name: str) -> bool:
    weight = config.modalities[name].weight
    return weight.schedule != "none" and weight.scale > 0


def _backbone(config: Config) -> type:
    if config.backbone.kind not in BACKBONES:
        raise InputError("backbone.kind", config.backbone.kind, f"choose one of {', '.join(sorted(BACKBONES))}")
    return BACKBONES[config.backbone.kind]


def _scheduler(config: Config) -> type[MTScheduler]:
    if config.scheduler.kind not in SCHEDULERS:
        raise InputError("scheduler.kind", config.scheduler.kind, f"choose one of {', '.join(sorted(SCHEDULERS))}")
    return SCHEDULERS[config.scheduler.kind]


def check_settings(key: str, cls: type, settings: dict[str, Any]) -> None:
    """Settings must be constructor arguments of the class, and complete."""
    parameters = _parameters(cls)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for name in settings:
            if name not in parameters:
                known = ", ".join(sorted(parameters))
                raise InputError(f"{key}.{name}", settings[name], f"unknown key; {cls.__name__} takes {known}")
    for name in missing_settings(cls, settings):
        raise InputError(f"{key}.{name}", None, "is missing and the data do not determine it; add it to the config")


def missing_settings(cls: type, settings: dict[str, Any]) -> list[str]:
    """Constructor arguments without a default that are not set."""
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        name
        for name, parameter in _parameters(cls).items()
        if parameter.default is parameter.empty and parameter.kind not in variable and name not in settings
    ]


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The constructor arguments that are for a config to set."""
    given = next(names for base, names in _GIVEN.items() if issubclass(cls, base))
    return {n: p for n, p in inspect.signature(cls.__init__).parameters.items() if n not in given}
