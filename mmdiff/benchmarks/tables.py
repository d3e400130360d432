"""What every benchmark leaves: a table as text, the whole as JSON, and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mmdiff.evaluation.report import make_room


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; the first row has the titles."""
    text = tabulate(rows, headers="firstrow", tablefmt="plain", disable_numparse=True)
    return [line.rstrip() for line in text.splitlines()]


def leave(stem: Path, tree: Any, text: str, draw: Callable[[Path], Any]) -> str:
    """Write ``stem``.json, .txt and .png; files that stand there are kept under a number.

    Args:
        stem: path without an ending.
        tree: for the JSON.
        text: the table.
        draw: writes the picture to a path.

    Returns:
        Lines that name the files.
    """
    data, table, picture = files = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".json", ".txt", ".png")]
    stem.parent.mkdir(parents=True, exist_ok=True)
    for file in files:
        make_room(file)
    data.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    table.write_text(text + "\n")
    draw(picture)
    return "\n".join(f"wrote {file}" for file in files)
