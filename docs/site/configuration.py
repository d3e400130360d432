"""The page *Configuration*: every key of the schema and every setting of a class, read from the source."""

from __future__ import annotations

import ast
import functools
import inspect
import io
import re
import tokenize
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import griffe
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mmdiff.config import Config

ROOT = Path(__file__).parents[2]
INTRODUCTION = (Path(__file__).parent / "configuration.md").read_text(encoding="utf-8")
CLASSES = {  # what a section's `kind` chooses from: the dict in the source
    "modalities.<name>": "mmdiff.modalities.MODALITIES",
    "backbone": "mmdiff.backbones.BACKBONES",
    "scheduler": "mmdiff.schedulers.SCHEDULERS",
}
NOT_SET = {"self", "shape", "head", "space", "observation_channels", "flag_widths", "weights"}  # not for a config
SANITY = 1e4  # a bound this far out only stops typing errors
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


class Setting(NamedTuple):
    """One row of a table."""

    key: str
    type: str
    default: str
    meaning: str


def page() -> str:
    """The Markdown of the page."""
    parts, kinds = [INTRODUCTION], []
    for heading, text, settings in sections(Config, ""):
        if kinds and not heading.startswith(kinds[0]):  # kinds follow the last part of their section
            parts, kinds = parts + kinds[1:], []
        parts += [f"## {f'`{heading}`' if heading else 'Top level'}", _linked(text), table(settings)]
        if heading in CLASSES:
            known = {setting.key.rpartition(".")[2] for setting in settings}
            kinds = [heading, f"## `{heading}.kind`"]
            for title, summary, rows in class_settings(CLASSES[heading]):
                kinds += [f"### {title}", summary, table([row for row in rows if row.key not in known])]
    return "\n\n".join(parts + kinds[1:]) + "\n"


def sections(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, list[Setting]]]:
    """(heading, docstring, settings) of a model and of the models in it."""
    inner: list[tuple[str, type[BaseModel]]] = []
    settings, comments = [], field_comments(model)
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        if found := inner_model(field.annotation):
            inner.append((f"{key}.<name>" if _is_dict(field.annotation) else key, found))
        else:
            settings.append(Setting(key, type_of(field), default_of(field), comments.get(name, "")))
    yield prefix.rstrip("."), inspect.getdoc(model) or "", settings
    for key, found in inner:
        yield from sections(found, f"{key}.")


def every_key() -> list[Setting]:
    """All rows of the page."""
    keys = [setting for _, _, settings in sections(Config, "") for setting in settings]
    return keys + [row for name in CLASSES.values() for _, _, rows in class_settings(name) for row in rows]


def field_comments(model: type[BaseModel]) -> dict[str, str]:
    """{field: the comment at the end of its line, or on the lines above it}, of a model and its bases."""
    found: dict[str, str] = {}
    for cls in reversed([base for base in model.__mro__ if issubclass(base, BaseModel) and base is not BaseModel]):
        source = inspect.cleandoc("\n" + inspect.getsource(cls))
        comments = {t.start[0]: t.string.lstrip("# ") for t in _tokens(source) if t.type == tokenize.COMMENT}
        lines = source.splitlines()
        for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                above = node.lineno - 1
                while above in comments and lines[above - 1].lstrip().startswith("#"):
                    above -= 1
                whole = [comments[line] for line in range(above + 1, node.lineno)]
                whole += [comments[node.end_lineno]] if node.end_lineno in comments else []
                found[node.target.id] = " ".join(whole)
    return found


def _tokens(source: str) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(source).readline)


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, by name or perhaps not at all."""
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _is_dict(annotation: Any) -> bool:
    return typing.get_origin(annotation) is dict


def type_of(field: FieldInfo) -> str:
    """The type, and the bounds that a value may meet."""
    bounds = [f"{sign} {value:g}" for sign, value in _bounds(field.metadata) if abs(value) < SANITY]
    return ", ".join([_type(field.annotation), *bounds])


def _bounds(metadata: list[Any]) -> Iterator[tuple[str, float]]:
    for one in metadata:
        yield from ((sign, getattr(one, name)) for name, sign in _BOUNDS.items() if hasattr(one, name))


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " / ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if part is types.NoneType else _type(part) for part in arguments)
    if origin is typing.Annotated:
        inner = ", ".join(f"{sign} {value:g}" for sign, value in _bounds(_metadata(arguments)) if abs(value) < SANITY)
        return f"{_type(arguments[0])} {inner}".strip()
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_type, arguments))}]"
    return getattr(annotation, "__name__", str(annotation).removeprefix("typing."))


def _metadata(arguments: tuple[Any, ...]) -> list[Any]:
    """Of `Annotated`, the field's own metadata included."""
    return [inner for part in arguments[1:] for inner in (part.metadata if isinstance(part, FieldInfo) else [part])]


def default_of(field: FieldInfo) -> str:
    """The default as it would stand in YAML."""
    return "required" if field.default is PydanticUndefined else _yaml(field.default)


def _yaml(value: Any) -> str:
    words = {None: "–", True: "`true`", False: "`false`"}
    if value is None or isinstance(value, bool):
        return words[value]
    return f"`{list(value) if isinstance(value, tuple) else value}`" if value != "" else "–"


def class_settings(dictionary: str) -> Iterator[tuple[str, str, list[Setting]]]:
    """(title, summary, settings) of every class that a dict of the source names."""
    module, _, name = dictionary.rpartition(".")
    package = _package()[module.removeprefix("mmdiff.")]
    node = ast.parse(str(package[name].value), mode="eval").body
    assert isinstance(node, ast.Dict)
    for key, value in zip(node.keys, node.values):
        cls = package[ast.unparse(value)]
        cls = cls.final_target if cls.is_alias else cls
        yield f"`kind: {ast.literal_eval(ast.unparse(key))}`", _summary(cls), list(arguments_of(cls))


@functools.cache
def _package() -> Any:
    return griffe.load("mmdiff", search_paths=[ROOT], submodules=True, resolve_aliases=True)


def _summary(cls: Any) -> str:
    return _linked(cls.docstring.value.split("\n\nArgs:")[0]) if cls.docstring else ""


def arguments_of(cls: Any) -> Iterator[Setting]:
    """The constructor's arguments, with what the class's docstring says of them."""
    meanings: dict[str, str] = {}
    for section in cls.docstring.parse("google", warnings=False) if cls.docstring else ():
        if section.kind is griffe.DocstringSectionKind.parameters:
            for parameter in section.value:
                meanings |= dict.fromkeys(parameter.name.split(", "), " ".join(parameter.description.split()))
    for parameter in cls.parameters:
        if parameter.name not in NOT_SET:
            annotation = re.sub(r"\b[A-Z]\w+\b", lambda name: _value_of(cls, name[0]), str(parameter.annotation))
            annotation = annotation.replace(" | ", " or ").replace("None", "none")
            yield Setting(parameter.name, annotation, _default(cls, parameter), meanings.get(parameter.name, ""))


def _value_of(cls: Any, name: str) -> str:
    """What a name of the class's module stands for, if it is one that the module assigns."""
    found = cls.module.members.get(name)
    if found is not None and found.is_alias:
        found = found.final_target if found.target_path.startswith("mmdiff.") else None
    return str(found.value) if found is not None and found.is_attribute else name


def _default(cls: Any, parameter: Any) -> str:
    if parameter.default is None:
        return "read from the data"
    try:
        return _yaml(ast.literal_eval(_value_of(cls, str(parameter.default))))
    except ValueError:
        return f"`{parameter.default}`"


def table(settings: list[Setting]) -> str:
    """A Markdown table."""
    if not settings:
        return ""
    rows = [f"| `{s.key}` | {_cell(s.type)} | {_cell(s.default)} | {_linked(_cell(s.meaning))} |" for s in settings]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])


def _cell(text: str) -> str:
    parts = re.split(r"(`[^`]*`)", text.replace("|", "\\|").replace("\n", " "))
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


def _linked(text: str) -> str:
    """A reference to a section of the theory as a link."""
    text = text.replace("``", "`")
    return re.sub(r"(?:README, Theory|docs/theory\.md), section (\d)", r"[Theory, section \1](theory.md)", text)
