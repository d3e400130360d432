"""The composition root: a config becomes data, model, scheduler and objective."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmdiff import lora
from mmdiff.alignment import Alignment
from mmdiff.config import Config, LoraConfig
from mmdiff.data import Holes, Rows, StandIn, Table, open_splits
from mmdiff.data.augment import Augment, build_augment
from mmdiff.data.buckets import Buckets
from mmdiff.data.embeddings import add_embeddings
from mmdiff.data.encoded import check_decided, latents_of, open_encoded, read_manifest
from mmdiff.data.files import undecoded, with_images
from mmdiff.data.sources import folder_of
from mmdiff.data.streamed import StreamedRows
from mmdiff.encoded import encoded_table, uses_latents
from mmdiff.errors import InputError, at
from mmdiff.modalities import find_modality
from mmdiff.model import MTDiffusionModel
from mmdiff.objective import MTObjective
from mmdiff.randomness import fold
from mmdiff.resolve import check_modalities, resolve, scheduler_class
from mmdiff.schedulers import MTScheduler
from mmdiff.sizes import build_buckets, reader_of
from mmdiff.states import DISTRIBUTIONS, StateProbabilities


@dataclass
class Experiment:
    """The parts of a run; ``config`` is resolved, see `mmdiff.resolve`."""

    config: Config
    train: Table | StandIn
    validation: Table | StandIn
    model: MTDiffusionModel
    scheduler: MTScheduler
    objective: MTObjective


def build(config: Config, hub: bool = True) -> Experiment:
    """Open the data, resolve the config and build all parts.

    Args:
        config: of the experiment.
        hub: as of `open_rows`.

    Raises:
        InputError: naming the config key.
    """
    rows, held_out = open_rows(config, hub)
    config = resolve(config, rows)
    scheduler = build_scheduler(config)
    model = build_model(config)
    objective = build_objective(config, model, scheduler)
    augment = build_augment(config.data, model.modalities, model.anchor, config.train.seed)
    buckets = build_buckets(config, model, rows)
    train = build_table(config, model, rows, config.data.missing, augment, buckets, latents=True)
    validation = build_table(config, model, held_out)
    return Experiment(config, train, validation, model, scheduler, objective)


def build_stand_in(config: Config) -> Experiment:
    """The same with random values in place of data, for a dry run.

    Raises:
        InputError: naming a setting that only the data determine.
    """
    config = resolve(config, None)
    model = build_model(config)
    scheduler = build_scheduler(config)
    examples = {name: modality.examples for name, modality in model.modalities.items()}
    manifest = read_manifest(config.data.source)
    if manifest is not None and uses_latents(model, manifest):
        shape, name = manifest.columns[latents_of(model.anchor)].shape, latents_of(model.anchor)
        examples[name] = lambda count, generator: torch.randn(count, *shape, generator=generator)
    table = StandIn(examples)
    return Experiment(config, table, table, model, scheduler, build_objective(config, model, scheduler))


def open_rows(config: Config, hub: bool = True) -> tuple[Rows, Rows]:
    """(training rows, held-out rows), with computed embeddings.

    Args:
        config: of the data.
        hub: whether the source may be a hub name.
    """
    check_modalities(config)
    data = config.data
    if (manifest := read_manifest(data.source)) is not None:
        check_decided(data, manifest)
        return open_encoded(data, manifest)
    streams = data.streams if data.streaming else 0
    splits = open_splits(data.source, data.split, data.validation_split, data.holdout, data.options, hub, streams)
    splits = tuple(undecoded(_with_images(config, rows)) for rows in splits)
    for name, encoder in data.embeddings.items():
        if isinstance(splits[0], StreamedRows) and config.column(name) not in splits[0].column_names:
            remedy = "would be computed of all rows, and these are streamed; write them once with `mmdiff encode`"
            raise InputError(f"data.embeddings.{name}", encoder.model, remedy)
        column = config.column(name)
        splits = tuple(
            rows
            if column in rows.column_names
            else add_embeddings(rows, column, encoder.column, encoder.model, encoder.pretrained)
            for rows in splits
        )
    return splits


def _with_images(config: Config, rows: Rows) -> Rows:
    """Columns of paths as images, for modalities that read images."""
    folder = folder_of(config.data.source)
    for name in sorted(set(config.modalities) - set(config.data.masking)):
        if find_modality(config.modalities[name].kind, f"modalities.{name}.kind").reads_images:
            rows = with_images(rows, f"data.columns.{name}", config.column(name), folder)
    return rows


@contextlib.contextmanager
def _small_enough() -> Iterator[None]:
    """One line for a network that does not fit into memory."""
    try:
        yield
    except (RuntimeError, MemoryError, OverflowError) as error:
        if not any(word in str(error).lower() for word in ("memory", "overflow", "storage size")):
            raise
        reason = str(error).splitlines()[0][:200]
        raise InputError("modalities and backbone", "sizes", f"are too large for memory ({reason})") from error


def model_settings(config: Config) -> dict[str, Any]:
    """Arguments of `MTDiffusionModel` from a resolved config."""
    return {
        "modality_config": {n: {"kind": m.kind, **m.settings()} for n, m in config.modalities.items()},
        "backbone_config": {"kind": config.backbone.kind, **config.backbone.settings()},
        "anchor": config.anchor,
        "diffused": {n: m.gain for n, m in config.modalities.items() if m.diffused} or None,
    }


def build_model(config: Config, initial_weights: bool = True) -> MTDiffusionModel:
    """The model with weights drawn from train.seed.

    Args:
        config: resolved.
        initial_weights: whether to read or download the pretrained weights that its settings name.
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
    keys = {
        f"weights.{name}{setting}": f"modalities.{name}.weight{setting}"
        for name, entry in weights.items()
        for setting in ("", *(f".{key}" for key in entry))
    }
    with at("scheduler", keys=keys):
        return scheduler_class(config)(**config.scheduler.model_dump(exclude={"kind"}), weights=weights)


def build_objective(config: Config, model: MTDiffusionModel, scheduler: MTScheduler) -> MTObjective:
    """The objective, with the state distribution of `states` and of each modality's `states`."""
    learned = [n for n in config.auxiliary() if config.modalities[n].weight.schedule == "learned"]
    objective = MTObjective(
        model,
        scheduler,
        state_probabilities={name: state_probabilities(config, name) for name in config.modalities},
        loss_weights={name: config.modalities[name].loss_weight for name in model.generated},
        distribution=config.states.distribution,
        terminal_weight=config.loss.terminal,
        anchor_hidden=config.states.anchor_hidden,
        equal_time=config.states.equal_time,
        own_time=config.states.own_time,
        min_snr_gamma=config.loss.min_snr_gamma,
        uncertainty=config.loss.uncertainty,
        learn_scale=tuple(name for name in learned if config.modalities[name].weight.learn_scale),
        learn_weights=config.loss.weighting == "learned",
        contrastive=checked_contrastive(config),
        alignment=build_alignment(config, model),
        seed=config.train.seed,
    )
    if config.train.lora is not None:
        adapt(objective, config.train.lora, config.train.seed)
    return objective


def adapt(objective: MTObjective, settings: LoraConfig, seed: int) -> None:
    """Let LoRA layers be trained instead of the network; an adapter holds no weight schedules, so they stay."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, 0, "lora"))
        lora.add(objective.model, settings.rank, settings.alpha, settings.targets, not settings.only_adapters)
    for parameter in (*objective.schedule_shapes.parameters(), *objective.schedule_scales.parameters()):
        parameter.requires_grad_(False)


def checked_contrastive(config: Config) -> float:
    """λ of contrastive flow matching, which is defined for velocities.

    Raises:
        InputError: for another target.
    """
    chosen, scheduler = config.loss.contrastive, config.scheduler
    if chosen and scheduler.settings().get("prediction_type") != "velocity":
        remedy = "is defined for scheduler.kind flow_match with prediction_type velocity; leave it out"
        raise InputError("loss.contrastive", chosen, remedy)
    return chosen


def build_alignment(config: Config, model: MTDiffusionModel) -> Alignment | None:
    """What `loss.repa` asks for, its projector drawn from train.seed."""
    chosen = config.loss.repa
    if chosen is None:
        return None
    with torch.random.fork_rng(devices=[]), at("loss.repa"):
        torch.manual_seed(fold(config.train.seed, 0, "repa"))
        return Alignment(model, **chosen.model_dump())


def state_probabilities(config: Config, name: str) -> StateProbabilities:
    """A modality's probabilities under `states.distribution`."""
    states, entry = config.states, config.modalities[name]
    if name == config.anchor:
        probabilities = StateProbabilities(0.0, states.anchor_observed)
    else:
        probabilities = StateProbabilities(
            states.aggregated if entry.states.aggregated is None else entry.states.aggregated,
            states.observed if entry.states.observed is None else entry.states.observed,
        )
    probabilities = DISTRIBUTIONS[states.distribution].probabilities(probabilities)
    weighted = name != config.anchor and entry.weight.schedule != "none" and entry.weight.scale > 0
    return probabilities._replace(aggregated=probabilities.aggregated * weighted)


def build_table(
    config: Config,
    model: MTDiffusionModel,
    rows: Rows,
    missing: Mapping[str, float] | None = None,
    augment: Augment | None = None,
    buckets: Buckets | None = None,
    latents: bool = False,
) -> Table:
    """Rows as batches of the model's values.

    Args:
        config: resolved.
        model: its modalities read the values.
        rows: of the source.
        missing: {modality: share of rows whose value is hidden}.
        augment: changes the rows that training visits.
        buckets: the sizes at which training visits them.
        latents: whether the anchor of an encoded data set is read as latents, where it has them.
    """
    masking = config.data.masking
    arguments = dict(  # noqa: C408 (they read as a call)
        rows=rows,
        columns={name: config.column(name) for name in model.names if name not in masking},
        **reader_of(model)._asdict(),
        is_missing={name: model.modalities[name].is_missing for name in model.names},
        holes={
            name: Holes(model.anchor, mask.pattern, mask.ratio, config.train.seed) for name, mask in masking.items()
        },
        missing=missing,
        one_of=config.data.one_of,
        seed=config.train.seed,
        cache_mib=0.0 if config.data.streaming else config.data.cache_mib,
        source=config.data.source,
        on_error=config.data.on_error,
        max_errors=config.data.max_errors,
        augment=augment,
        buckets=buckets,
    )
    manifest = read_manifest(config.data.source)
    return Table(**arguments) if manifest is None else encoded_table(config, model, manifest, latents, arguments)
