"""Untrusted folders and configs: their code is never run without consent, and they stay within their folder."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mmdiff.errors import InputError

TRUST = "to import it pass trust_custom_modalities=True, on the command line --trust-custom-modalities"
LARGEST = 2**16  # any number of a network's settings
UNREAD = ("wandb",)  # folders of a run that nothing here reads; W&B links its logs to the cache of the user
_DAMAGE = (OSError, ValueError, RuntimeError, SafetensorError, LookupError, TypeError, AttributeError, MemoryError)
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def is_custom(kind: Any) -> bool:
    """Whether a kind is an import path."""
    return isinstance(kind, str) and ":" in kind


def custom_kinds(config: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key, import path) of all custom code that a tree names, at any depth."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name == "kind" and is_custom(value):
                yield f"{key}.{name}", value
            yield from custom_kinds(value, f"{key}.{name}")
    elif isinstance(config, list | tuple):
        for place, value in enumerate(config):
            yield from custom_kinds(value, f"{key}.{place}")


def refuse_custom(config: Any, key: str = "modalities") -> None:
    """Refuse configs that name code by import path, without an import.

    Raises:
        InputError: naming the first key, and how to trust it.
    """
    for place, path in custom_kinds(config, key):
        raise InputError(place, path, f"is code of its author's; {TRUST}")


def refuse_huge(config: Any, key: str) -> None:
    """Refuse numbers in a network's settings that would fill the memory.

    Raises:
        InputError: naming the first number above `LARGEST`.
    """
    inner = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else ()
    for name, value in inner:
        refuse_huge(value, f"{key}.{name}")
    if isinstance(config, int | float) and not abs(config) <= LARGEST:
        raise InputError(key, config, f"is larger than {LARGEST}; no network is that wide or deep")


@contextlib.contextmanager
def damage(key: str, path: Any) -> Iterator[None]:
    """One line for any error while a folder is read.

    Raises:
        InputError: naming the folder.
    """
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(key, str(path), f"is damaged or missing, {type(error).__name__}: {error}") from None


def stay_offline() -> None:
    """Switch off network access, also of libraries that are imported already."""
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            sys.modules[module].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def offline() -> bool:
    """Whether network access is switched off."""
    return os.environ.get(_OFFLINE[0], "").upper() in ("1", "ON", "YES", "TRUE")


def check_links(key: str, folder: str | os.PathLike) -> None:
    """Refuse symbolic links that lead out of a folder.

    Args:
        key: for the error.
        folder: of a run or a pipeline, which may be a link itself; hub names are ignored.

    Raises:
        InputError: naming the link.
    """
    if not (isinstance(folder, str | os.PathLike) and Path(folder).is_dir()):
        return
    home = Path(folder).resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # of the hub's cache, whose files are links to its blobs
        allowed.append(home.parent.parent / "blobs")
    for path in Path(folder).rglob("*"):
        if path.relative_to(folder).parts[0] in UNREAD:
            continue
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in allowed):
            raise InputError(key, str(path), "is a link that leads out of its folder; put the file itself there")
