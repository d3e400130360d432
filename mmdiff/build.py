"""The composition root: a config becomes data, model, scheduler and objective. Nothing else knows how they fit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmdiff.config import Config
from mmdiff.data import Holes, Rows, StandIn, Table, open_splits
from mmdiff.data.embeddings import add_embeddings
from mmdiff.data.files import undecoded, with_images
from mmdiff.data.sources import folder_of
from mmdiff.errors import InputError
from mmdiff.modalities import find_modality
from mmdiff.model import MTDiffusionModel
from mmdiff.objective import MTObjective
from mmdiff.randomness import fold
from mmdiff.resolve import check_modalities, resolve, scheduler_class
from mmdiff.schedulers import MTScheduler
from mmdiff.states import DISTRIBUTIONS, StateProbabilities


@dataclass
class Experiment:
    """Everything a run needs; ``config`` is resolved: what the data determine is filled in."""

    config: Config
    train: Table | StandIn
    validation: Table | StandIn
    model: MTDiffusionModel
    scheduler: MTScheduler
    objective: MTObjective


def build(config: Config, hub: bool = True) -> Experiment:
    """Open the data, read off what they determine, and build all parts.

    Args:
        config: of the experiment.
        hub: see `open_rows`.

    Raises:
        InputError: naming the config key.
    """
    rows, held_out = open_rows(config, hub)
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


def open_rows(config: Config, hub: bool = True) -> tuple[Rows, Rows]:
    """(training rows, held-out rows), with the embeddings that are to be computed.

    Args:
        config: whose data are opened.
        hub: whether the source may be a name of the hub.
    """
    check_modalities(config)
    data = config.data
    splits = open_splits(data.source, data.split, data.validation_split, data.holdout, data.options, hub)
    splits = tuple(undecoded(_with_images(config, rows)) for rows in splits)
    for name, encoder in data.embeddings.items():
        column = config.column(name)
        splits = tuple(
            rows
            if column in rows.column_names
            else add_embeddings(rows, column, encoder.column, encoder.model, encoder.pretrained)
            for rows in splits
        )
    return splits


def _with_images(config: Config, rows: Rows) -> Rows:
    """Columns of paths as images, where a modality reads images."""
    folder = folder_of(config.data.source)
    for name in sorted(set(config.modalities) - set(config.data.masking)):
        if find_modality(config.modalities[name].kind, f"modalities.{name}.kind").reads_images:
            rows = with_images(rows, f"data.columns.{name}", config.column(name), folder)
    return rows


@contextlib.contextmanager
def _small_enough() -> Iterator[None]:
    """A network that memory cannot hold is refused in one line."""
    try:
        yield
    except (RuntimeError, MemoryError, OverflowError) as error:
        if not any(word in str(error).lower() for word in ("memory", "overflow", "storage size")):
            raise
        said = str(error).splitlines()[0][:200]
        raise InputError("modalities and backbone", "sizes", f"are too large for memory ({said})") from error


def model_settings(config: Config) -> dict[str, Any]:
    """What a resolved config says of the networks, as arguments of `MTDiffusionModel`."""
    return {
        "modality_config": {n: {"kind": m.kind, **m.settings()} for n, m in config.modalities.items()},
        "backbone_config": {"kind": config.backbone.kind, **config.backbone.settings()},
        "anchor": config.anchor,
    }


def build_model(config: Config, initial_weights: bool = True) -> MTDiffusionModel:
    """The model with weights drawn from train.seed.

    Args:
        config: resolved.
        initial_weights: whether to read, or download, the pretrained weights that its settings name.
    """
    with torch.random.fork_rng(devices=[]), _small_enough():
        torch.manual_seed(fold(config.train.seed, 0, "weights"))
        observable = [name for name in sorted(config.modalities) if state_probabilities(config, name).observed > 0]
        model = MTDiffusionModel(**model_settings(config), observable=observable)
    if initial_weights:
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
        return scheduler_class(config)(**config.scheduler.model_dump(exclude={"kind"}), weights=weights)
    except InputError as error:
        key = error.key.split(".")
        where = (
            f"modalities.{key[1]}.weight" + "".join(f".{k}" for k in key[2:])
            if key[0] == "weights"
            else f"scheduler.{error.key}"
        )
        raise InputError(where, error.value, error.remedy) from None


def build_objective(config: Config, model: MTDiffusionModel, scheduler: MTScheduler) -> MTObjective:
    """The objective, with the distribution of states that `states` and each modality's own `states` set."""
    learned = [n for n in config.auxiliary() if config.modalities[n].weight.schedule == "learned"]
    return MTObjective(
        model,
        scheduler,
        state_probabilities={name: state_probabilities(config, name) for name in config.modalities},
        loss_weights={name: config.modalities[name].loss_weight for name in model.generated},
        distribution=config.states.distribution,
        terminal_weight=config.loss.terminal,
        anchor_hidden=config.states.anchor_hidden,
        min_snr_gamma=config.loss.min_snr_gamma,
        uncertainty=config.loss.uncertainty,
        learn_scale=tuple(name for name in learned if config.modalities[name].weight.learn_scale),
        seed=config.train.seed,
    )


def state_probabilities(config: Config, name: str) -> StateProbabilities:
    """A modality's probabilities under `states.distribution`."""
    states, own = config.states, config.modalities[name].states
    if name == config.anchor:
        given = StateProbabilities(0.0, states.anchor_observed)
    else:
        given = StateProbabilities(
            states.aggregated if own.aggregated is None else own.aggregated,
            states.observed if own.observed is None else own.observed,
        )
    probabilities = DISTRIBUTIONS[states.distribution].given(given)
    able = name != config.anchor and _has_weight(config, name)
    return probabilities._replace(aggregated=probabilities.aggregated * able)


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
        is_missing={name: model.modalities[name].is_missing for name in model.names},
        placeholders={name: model.modalities[name].placeholder() for name in model.names},
        holes={
            name: Holes(model.anchor, mask.pattern, mask.ratio, config.train.seed) for name, mask in masking.items()
        },
        missing=missing,
        seed=config.train.seed,
        cache_mib=config.data.cache_mib,
        source=config.data.source,
        on_error=config.data.on_error,
        max_errors=config.data.max_errors,
    )


def _has_weight(config: Config, name: str) -> bool:
    weight = config.modalities[name].weight
    return weight.schedule != "none" and weight.scale > 0
