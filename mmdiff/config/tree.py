"""Untrusted YAML as a plain tree: of limited size, without resolvers and without aliases that expand."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from mmdiff.errors import InputError

MAX_BYTES = 1_000_000
MAX_NODES = 20_000  # with every alias expanded
MAX_DEPTH = 50
MAX_REFERENCES = 16  # `${key}` in one file; references to references can double at every level
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # as omegaconf
_REFERENCE = re.compile(r"\$\{[\w.\[\]-]+\}")  # ${key}, ${.key}, ${a.b[0]}; no resolver, which has a colon


def read_tree(key: str, path: Path) -> Any:
    """A YAML file as OmegaConf's tree, without resolving references.

    Args:
        key: for errors.
        path: of the file.

    Raises:
        InputError: if it cannot be read, is too large or too deep, or uses a resolver.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(key, str(path), f"is larger than {MAX_BYTES} bytes, too large for a config")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(key, str(path), f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(key, str(path), "is no text in UTF-8") from None
    try:
        check_depth(key, str(path), text)
        expanded_nodes(key, str(path), yaml.compose(text, Loader=_LOADER))
        tree = OmegaConf.load(io.StringIO(text))
        check_references(key, tree)
        return tree
    except InputError:
        raise
    except Exception as error:  # yaml and omegaconf raise families of their own
        raise InputError(key, str(path), f"is no valid YAML: {error}") from None


def plain(key: str, tree: Any) -> Any:
    """OmegaConf's tree as dicts and lists, with resolved `${key}` references.

    Raises:
        InputError: for a reference without a target, and for a resolver.
    """
    check_references(key, tree)
    try:
        return OmegaConf.to_container(tree, resolve=True)
    except Exception as error:  # omegaconf raises a family of its own, and RecursionError
        raise InputError(key, type(error).__name__, f"a reference cannot be resolved: {error}") from None


def check_references(key: str, tree: Any) -> None:
    """Refuse `${name:…}`: a resolver reads the environment or runs a registered function.

    Raises:
        InputError: with the text.
    """
    texts = [text for text in _texts(OmegaConf.to_container(tree, resolve=False)) if "${" in text]
    for text in texts:
        if "${" in _REFERENCE.sub("", text):
            raise InputError(key, text, "asks for a resolver; only references such as ${train.steps} are read")
    if sum(text.count("${") for text in texts) > MAX_REFERENCES:
        raise InputError(key, len(texts), f"values with references are too many; {MAX_REFERENCES} references may be")


def check_literal(key: str, tree: Any) -> None:
    """Refuse texts that would be read as references.

    Raises:
        InputError: with the text.
    """
    for text in _texts(tree):
        if "${" in text:
            raise InputError(key, text, "would be read as a reference when it is saved; rename it")


def check_depth(key: str, value: str, text: str) -> None:
    """Refuse deep nesting before a recursive parser reads it.

    Raises:
        InputError: for more than `MAX_DEPTH` levels.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise InputError(key, value, f"is nested deeper than {MAX_DEPTH} levels")


def expanded_nodes(key: str, value: str, node: yaml.Node | None) -> int:
    """The number of nodes of a composed YAML file with expanded aliases.

    Raises:
        InputError: for more than `MAX_NODES`, more than `MAX_DEPTH` levels, or an alias within itself.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise InputError(key, value, f"is nested deeper than {MAX_DEPTH} levels, or an alias holds itself")
        if id(node) not in sizes:
            sizes[id(node)] = 1 + sum(size(child, depth + 1) for child in _children(node))
        if sizes[id(node)] > MAX_NODES:
            raise InputError(key, value, f"its aliases make more than {MAX_NODES} values")
        return sizes[id(node)]

    return size(node, 0) if node is not None else 0


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _texts(tree: Any) -> Iterator[str]:
    """All texts of a plain tree, keys too."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield str(name)
            yield from _texts(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value)
    elif isinstance(tree, str):
        yield tree
