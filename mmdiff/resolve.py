"""Settings that files, the anchor and the data determine, and checks of settings against their classes."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from mmdiff.backbones import Backbone, find_backbone
from mmdiff.config import Config, DataConfig, MaskingConfig, ModalityConfig, WeightConfig, parse_arguments
from mmdiff.data import Rows
from mmdiff.data.choice import items_of
from mmdiff.data.encoded import check_decided, read_manifest
from mmdiff.data.masking import known_masks
from mmdiff.data.streamed import FIRST, StreamedRows
from mmdiff.data.table import ROW, origin
from mmdiff.encoded import encoded_settings
from mmdiff.errors import InputError, at
from mmdiff.modalities import Anchor, Condition, find_modality
from mmdiff.model import check_name
from mmdiff.pretrained import with_source
from mmdiff.schedulers import SCHEDULERS, MTScheduler, resolution_shift

LARGEST = 1e9  # any number among the settings of a class
_RESERVED = {  # arguments that a config cannot set
    Condition: {"self", "shape", "head"},
    Backbone: {"self", "space", "observation_channels", "flag_widths"},
    MTScheduler: {"self", "weights"},
}


def needs_data(config: Config) -> bool:
    """Whether the data determine a setting."""
    return any(missing_settings(kind, settings) for kind, settings in _all_settings(config, None).values())


def resolve(config: Config, rows: Rows | None) -> Config:
    """The config with every setting that files and data determine: sizes, channels, numbers of classes.

    Args:
        config: as read.
        rows: training rows; None: resolve without data.

    Raises:
        InputError: naming a setting that is unknown, or missing and not determined.
    """
    check_modalities(config)
    config = with_source(config)
    named = {*config.data.masking, *config.data.embeddings, *config.data.missing, *config.data.one_of}
    for name in named - set(config.modalities):
        raise InputError("data", name, f"names no modality; choose from {', '.join(sorted(config.modalities))}")
    for name, masking in config.data.masking.items():
        _check_holes(f"data.masking.{name}", masking)
    for name, masking in config.evaluate.masking.items():
        _check_holes(f"evaluate.masking.{name}", masking)
    modalities, settings_of = {}, _all_settings(config, rows)
    for name, entry in config.modalities.items():
        kind, settings = settings_of[name]
        check_settings(f"modalities.{name}", kind, settings)
        _check_diffused(f"modalities.{name}", entry, name == config.anchor)
        modalities[name] = entry.model_copy(update={**settings, "weight": _weight(name, entry, kind)})
    backbone = find_backbone(config.backbone.kind)
    check_types("backbone", backbone, config.backbone.settings())
    check_settings("backbone", backbone, config.backbone.settings())
    resolved = config.model_dump()
    resolved["modalities"] = {name: entry.model_dump() for name, entry in modalities.items()}
    resolved["scheduler"]["clip_sample"] = _clip_sample(config, modalities)
    if resolved["scheduler"].get("time_shift") == "resolution":
        resolved["scheduler"]["time_shift"] = _resolution_shift(config, modalities[config.anchor])
    return resolve_scheduler(Config.model_validate(resolved))


def check_modalities(config: Config) -> None:
    """Refuse names and kinds of modalities that cannot be used with any data.

    Raises:
        InputError: naming the modality.
    """
    for name, entry in config.modalities.items():
        check_name(name)
        find_modality(entry.kind, f"modalities.{name}.kind")


def resolve_scheduler(config: Config) -> Config:
    """The config with every argument of the scheduler's class, also arguments newer than the config.

    Raises:
        InputError: naming a setting that is unknown or of a wrong type.
    """
    cls, settings = scheduler_class(config), config.scheduler.model_dump(exclude={"kind"})
    hints, parameters = typing.get_type_hints(cls.__init__), _parameters(cls)
    arguments = {name: (hints[name], parameter.default) for name, parameter in parameters.items()}
    if settings["clip_sample"] is None:  # left to the anchor
        del settings["clip_sample"], arguments["clip_sample"]
    resolved = config.model_dump()
    resolved["scheduler"] |= parse_arguments("scheduler", arguments, settings)
    return Config.model_validate(resolved)


def _all_settings(config: Config, rows: Rows | None) -> dict[str, tuple[type[Condition], dict[str, Any]]]:
    """{modality: (class, settings)}. The anchor comes first, as other settings depend on it."""
    settings: dict[str, tuple[type[Condition], dict[str, Any]]] = {}
    for name in (config.anchor, *config.auxiliary()):
        kind = find_modality(config.modalities[name].kind, f"modalities.{name}.kind")
        anchor = {} if name == config.anchor else settings[config.anchor][1]
        settings[name] = kind, _resolved_settings(config, name, kind, rows, anchor)
    return settings


def _resolved_settings(
    config: Config, name: str, kind: type[Condition], rows: Rows | None, anchor: dict[str, Any]
) -> dict[str, Any]:
    """Settings of the config, completed from files, the anchor and the data."""
    check_types(f"modalities.{name}", kind, config.modalities[name].settings())
    settings = {**kind.settings_from_anchor(**anchor), **config.modalities[name].settings()}
    with at(f"modalities.{name}"):
        settings = {**kind.settings_from_files(**settings), **settings}
    if name in config.data.masking:
        return settings
    if (manifest := read_manifest(config.data.source)) is not None:
        check_decided(config.data, manifest)
        return encoded_settings(config, name, kind, settings, manifest)
    if rows is None:
        return settings
    column = config.column(name)
    if column not in rows.column_names:
        columns = ", ".join(one for one in rows.column_names if one != ROW)
        remedy = f"the source has no such column, but {columns}; set data.columns.{name}=…"
        raise InputError(f"data.columns.{name}", column, remedy)
    if streamed := isinstance(rows, StreamedRows):
        with at(f"modalities.{name}"):
            settings = {**kind.settings_from_stream(rows.features[column], **settings), **settings}
    values = _Readable(rows, column, kind, config.data, FIRST if streamed else None, name in config.data.one_of)
    with at(f"data.columns.{name}={column}", ": "):
        return {**kind.settings_from_data(rows.features[column], values, **settings), **settings}


class _Readable:
    """The readable values of the first ``limit`` rows, however often they are asked for; others are refused or skipped,
    by `data.on_error`. Where the column holds lists, ``several``, each item is a value."""

    def __init__(
        self, rows: Rows, column: str, kind: type[Condition], data: DataConfig, limit: int | None, several: bool
    ) -> None:
        self.rows, self.column, self.kind, self.data, self.limit = rows, column, kind, data, limit
        self.several = several

    def __iter__(self) -> Iterator[Any]:
        chosen = self.rows.select_columns(sorted({self.column, ROW} & set(self.rows.column_names)))
        for index in range(len(chosen) if self.limit is None else min(self.limit, len(chosen))):
            try:
                row = chosen[index]
                with at(f"row {row.get(ROW, index)} of {origin(self.data.source, self.rows)}", ": "):
                    values = items_of(row[self.column]) if self.several else [row[self.column]]
                    for value in values:
                        if value is not None:
                            self.kind.check_readable(value)
            except InputError:
                if self.data.on_error == "raise":
                    raise
                continue
            yield from values


def _check_holes(key: str, masking: MaskingConfig) -> None:
    with at(key):
        known_masks(masking.pattern, masking.ratio, 32, 32, 0, torch.zeros(1, dtype=torch.int64))


def _resolution_shift(config: Config, anchor: ModalityConfig) -> float:
    """`time_shift: resolution` of the anchor's diffusion space."""
    _, height, width = find_modality(anchor.kind, "").diffusion_space(**anchor.settings())
    return resolution_shift(height, width)


def _weight(name: str, entry: ModalityConfig, kind: type[Condition]) -> WeightConfig:
    """The weight schedule; by default "none" for a modality that is never aggregated, or diffused."""
    if kind.aggregable:
        return entry.weight or (WeightConfig(schedule="none") if entry.diffused else WeightConfig())
    if entry.weight is not None and entry.weight.schedule != "none":
        remedy = f"{kind.__name__} is observed or absent, never aggregated; leave weight out"
        raise InputError(f"modalities.{name}.weight.schedule", entry.weight.schedule, remedy)
    return WeightConfig(schedule="none")


def _check_diffused(key: str, entry: ModalityConfig, anchor: bool) -> None:
    if entry.diffused and anchor:
        raise InputError(f"{key}.diffused", True, "the anchor is always diffused; leave it out")
    if entry.gain != 1 and not entry.diffused:
        raise InputError(f"{key}.gain", entry.gain, "is of a diffused modality; leave it out, or set diffused: true")


def _clip_sample(config: Config, modalities: dict[str, ModalityConfig]) -> bool:
    anchor = modalities[config.anchor]
    kind = find_modality(anchor.kind, "")
    bounded = issubclass(kind, Anchor) and kind.bounded(**anchor.settings())
    if config.scheduler.clip_sample and not bounded:
        raise InputError("scheduler.clip_sample", True, "the anchor's encodings have no bounds; leave it out")
    return bounded if config.scheduler.clip_sample is None else config.scheduler.clip_sample


def check_settings(key: str, cls: type, settings: dict[str, Any]) -> None:
    """Refuse settings that are no constructor arguments of the class, and missing ones."""
    parameters = _parameters(cls)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for name in settings:
            if name not in parameters:
                known = ", ".join(sorted(parameters))
                raise InputError(f"{key}.{name}", settings[name], f"unknown key; {cls.__name__} takes {known}")
    for name in missing_settings(cls, settings):
        raise InputError(f"{key}.{name}", None, "is missing and the data do not determine it; add it to the config")


def check_types(key: str, cls: type, settings: dict[str, Any]) -> None:
    """Refuse settings that are not of the types that the constructor declares.

    Raises:
        InputError: naming the setting.
    """
    try:
        hints = typing.get_type_hints(cls.__init__)
    except (NameError, TypeError):  # annotations of custom classes need not resolve
        return
    for name in settings.keys() & hints.keys() & _parameters(cls).keys():
        try:
            kind = TypeAdapter(hints[name], config=ConfigDict(allow_inf_nan=False))
            kind.validate_json(json.dumps(settings[name]), strict=True)  # strict JSON: "3" is no number
            _check_size(f"{key}.{name}", settings[name])
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Input ")
            raise InputError(f"{key}.{name}", settings[name], f"{problem[0].lower()}{problem[1:]}") from None
        except (PydanticUserError, PydanticSchemaGenerationError, TypeError):  # types without a JSON form
            continue


def _check_size(key: str, value: Any) -> None:
    """Refuse numbers beyond any count or scale of a network."""
    for number in value if isinstance(value, list | tuple) else (value,):
        if isinstance(number, int | float) and abs(number) > LARGEST:
            raise InputError(key, value, f"is too large; numbers go up to {LARGEST:g}")


def missing_settings(cls: type, settings: dict[str, Any]) -> list[str]:
    """Constructor arguments without a default that the settings lack."""
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        name
        for name, parameter in _parameters(cls).items()
        if parameter.default is parameter.empty and parameter.kind not in variable and name not in settings
    ]


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The constructor arguments that a config can set."""
    reserved = next(names for base, names in _RESERVED.items() if issubclass(cls, base))
    return {n: p for n, p in inspect.signature(cls.__init__).parameters.items() if n not in reserved}


def scheduler_class(config: Config) -> type[MTScheduler]:
    """The class of `scheduler.kind`."""
    if config.scheduler.kind not in SCHEDULERS:
        raise InputError("scheduler.kind", config.scheduler.kind, f"choose one of {', '.join(sorted(SCHEDULERS))}")
    return SCHEDULERS[config.scheduler.kind]
