"""Results as text: the facts of a manifest, and tables in Markdown."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH = 10_000  # characters; a row is one line, however long


def facts(manifest: Mapping[str, Any]) -> list[str]:
    """A line per fact."""
    return [f"{key}: {json.dumps(value, ensure_ascii=False, default=str)}" for key, value in manifest.items()]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table.

    Args:
        head: titles of the columns.
        rows: as many cells each.
    """
    grid = Table(*head, box=box.MARKDOWN)
    for row in rows:
        grid.add_row(*row)
    console = Console(file=io.StringIO(), width=_WIDTH, markup=False, highlight=False, emoji=False, color_system=None)
    console.print(grid)
    return [line.strip() for line in console.file.getvalue().splitlines() if line.strip()]


def grouped(rows: Sequence[Any], keys: Sequence[tuple]) -> Iterator[tuple[tuple, list[Any]]]:
    """(key, its rows), keys in the order in which they come first.

    Args:
        rows: anything.
        keys: one of each row.
    """
    for key, own in pd.Series(list(rows), dtype=object).groupby(pd.Index(keys, tupleize_cols=False), sort=False):
        yield key, own.tolist()
