"""Finished parts of a benchmark on disk: a part is written whole or not at all, and is never computed twice."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def key_of(facts: Any) -> str:
    """SHA-256 of all that a part is a function of, plain dicts and lists."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def stored(path: Path, write: Callable[[Path], Any]) -> Path:
    """The path of a part; ``write`` makes the part where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        write(partial)
        partial.replace(path)
    return path


def stored_json(path: Path, compute: Callable[[], Any]) -> Any:
    """A part of plain dicts and lists; ``compute`` gives it where there is none."""

    def write(partial: Path) -> None:
        partial.write_text(json.dumps(compute(), indent=1) + "\n")

    return json.loads(stored(path, write).read_text())


def write_results(
    folder: Path, name: str, tree: dict[str, Any], text: str, draw: Callable[[Path], Any]
) -> dict[str, Path]:
    """Write NAME.json, NAME.txt and NAME.png; files of these names are kept under a number.

    Args:
        folder, name: of the files.
        tree: the results, plain dicts and lists.
        text: their table.
        draw: writes the picture to a path.
    """
    files = {suffix: folder / f"{name}.{suffix}" for suffix in ("json", "txt", "png")}
    for path in files.values():
        if path.exists():
            numbered = (path.with_stem(f"{path.stem}-{k}") for k in itertools.count(1))
            path.rename(next(candidate for candidate in numbered if not candidate.exists()))
    files["json"].write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    files["txt"].write_text(text + "\n")
    draw(files["png"])
    return files
