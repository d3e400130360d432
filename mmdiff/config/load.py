"""Read a config from YAML and `key=value` overrides, check it and write it; every error is one line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import pydantic
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmdiff.config.base import Strict
from mmdiff.config.schema import Config
from mmdiff.config.tree import check_literal, check_references, plain, read_tree
from mmdiff.errors import InputError, at


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `key=value` overrides and check everything.

    Raises:
        InputError: one line with the key, the value and the remedy.
    """
    return parse_config(read_plain("config", path, overrides))


def read_plain(key: str, path: str | Path, overrides: list[str] | None = None) -> Any:
    """A YAML file with `key=value` overrides as dicts and lists.

    Args:
        key: for errors.
        path: of the file.
        overrides: texts.

    Raises:
        InputError: one line with the key, the value and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(key, str(path), "no such file")
    tree, more = read_tree(key, path), parse_overrides(overrides or [])
    try:
        merged = OmegaConf.merge(tree, more)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise InputError(key, str(path), f"the overrides do not fit it: {error}") from None
    return plain(key, merged)


def parse_overrides(items: list[str]) -> Any:
    """`key=value` texts as one tree.

    Raises:
        InputError: one line with the text and the remedy.
    """
    tree = OmegaConf.create()
    for item in items:
        if "=" not in item:
            raise InputError("override", item, "write key=value, for example train.steps=600")
        try:
            entry = OmegaConf.from_dotlist([item])
            check_references("override", entry)
            tree = OmegaConf.merge(tree, entry)
        except InputError:
            raise
        except Exception as error:  # yaml and omegaconf raise families of their own
            raise InputError("override", item, f"its value is no valid YAML: {error}") from None
    return tree


def parse_config(tree: Any) -> Config:
    """Check a plain tree of dicts and lists."""
    if not isinstance(tree, dict):
        raise InputError("config", tree, "must be a mapping of keys")
    try:
        config = Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise _readable(error.errors()[0], Config) from None
    if config.anchor not in config.modalities:
        raise InputError("anchor", config.anchor, f"choose one of modalities: {', '.join(sorted(config.modalities))}")
    if config.train.initialize_from is not None and config.backbone.initialize_from is not None:
        remedy = "a run starts from one folder; leave this or backbone.initialize_from out"
        raise InputError("train.initialize_from", config.train.initialize_from, remedy)
    if config.train.lora is not None and config.train.initialize_from == config.backbone.initialize_from:
        raise InputError(
            "train.lora",
            config.train.lora.model_dump(),
            "adapts a pretrained network; name one, backbone.initialize_from or train.initialize_from",
        )
    for name in config.data.columns:
        if name not in config.modalities:
            raise InputError(f"data.columns.{name}", config.data.columns[name], "names no modality")
    return config


def parse_arguments(key: str, arguments: Mapping[str, tuple[Any, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a class with its defaults, checked against the types of its constructor.

    Args:
        key: of the section.
        arguments: {name: (annotation, default)}.
        settings: of the config.

    Raises:
        InputError: for an unknown key, with the nearest known one, and for a wrong type.
    """
    model: Any = pydantic.create_model(key, __base__=Strict, **arguments)
    try:
        return model.model_validate(settings).model_dump()
    except pydantic.ValidationError as error:
        with at(key):
            raise _readable(error.errors()[0], model) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config."""
    path.write_text(as_yaml(config), encoding="utf-8")


def as_yaml(config: Config) -> str:
    """The config as YAML.

    Raises:
        InputError: for a text that would be read as a reference.
    """
    tree = config.model_dump(mode="json")
    check_literal("config", tree)
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def first_difference(one: Config, other: Config, ignore: set[str]) -> tuple[str, Any, Any] | None:
    """(key, value in one, value in other) of the first key in which two configs differ."""
    return _difference(one.model_dump(mode="json"), other.model_dump(mode="json"), "", ignore)


def _difference(one: Any, other: Any, key: str, ignore: set[str]) -> tuple[str, Any, Any] | None:
    if key in ignore:
        return None
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(set(one) | set(other)):
            if difference := _difference(one.get(name), other.get(name), f"{key}.{name}".lstrip("."), ignore):
                return difference
        return None
    return None if one == other else (key, one, other)


def _readable(error: Any, model: Any) -> InputError:
    """A pydantic error as an `InputError`; unknown keys get the nearest known one."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(model, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        return InputError(key, error["input"], f"unknown key; {hint}")
    if error["type"] == "missing":
        return InputError(key, None, "is missing; add it to the config")
    message = error["msg"].removeprefix("Value error, ")
    return InputError(key, error["input"], message[0].lower() + message[1:])


def _fields_at(model: Any, path: tuple) -> list[str]:
    """Names of the fields of a model's section at a path of keys."""
    for part in path:
        model = get_args(model)[1] if get_origin(model) is dict else model.model_fields[part].annotation
        if get_origin(model) is UnionType:  # an optional section
            model = next(section for section in get_args(model) if section is not type(None))
    return sorted(model.model_fields)
