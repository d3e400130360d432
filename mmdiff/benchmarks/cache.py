"""Finished parts of a benchmark, each in a file of its own: what is stored is never computed again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmdiff.training.disk import whole


def store(path: Path, write: Callable[[Path], Any]) -> None:
    """A part stands whole under its name, or not at all.

    Args:
        path: of the part; its folder is made.
        write: writes it to a path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        write(partial)


def store_json(path: Path, tree: Any) -> None:
    """A part as JSON."""
    store(path, lambda partial: partial.write_text(json.dumps(tree, indent=1) + "\n"))
