"""The fusion benchmark's results as text."""

from __future__ import annotations

from typing import Any

from mmdiff.benchmarks.fusion.learning import FINE_TUNED, ZERO_SHOT
from mmdiff.evaluation.tables import facts, grouped, table

ALL = "all"  # cells together: the mean over those with two photos and more
BASES = (ZERO_SHOT, FINE_TUNED)


def text(tree: dict[str, Any]) -> str:
    """The table of every task, and the gains."""
    lines = facts(tree["manifest"])
    for (task,), rows in grouped(tree["rows"], [(row["task"],) for row in tree["rows"]]):
        counts = list(dict.fromkeys(row["photos"] for row in rows if row["photos"] != ALL))
        shares = list(dict.fromkeys(row["distractors"] for row in rows if row["distractors"] != ALL))
        heads = [*(f"n = {count}" for count in counts), *(f"{share:.0%} distractors" for share in shares)]
        places = [*((count, ALL) for count in counts), *((ALL, share) for share in shares)]
        cells = [
            _cells(entry, {(row["photos"], row["distractors"]): row for row in own}, places)
            for (entry,), own in grouped(rows, [(row["entry"],) for row in rows])
        ]
        lines += ["", f"{task}: means over the sets of two photos and more [95 % between seeds]", ""]
        lines += table(["", "accuracy", "precision", "recall", *heads, "weight on distractors (1/n)"], cells)
    cells = [[f"{r['task']}: {r['entry']}", *(_score(r[base], "+") for base in BASES)] for r in tree["gains"]]
    return "\n".join([*lines, "", *table(["accuracy minus that of", *BASES], cells)])


def _cells(entry: str, rows: dict[tuple, dict[str, Any]], places: list[tuple]) -> list[str]:
    """A line of the table; ``rows`` by (photos, distractors)."""
    whole = rows[ALL, ALL]
    means = [f"{whole[name]['mean']:.3f}" for name in ("precision", "recall")]
    each = [f"{rows[place]['accuracy']['mean']:.3f}" for place in places]
    return [entry, _score(whole["accuracy"]), *means, *each, _weights(whole)]


def _score(score: dict[str, Any], sign: str = "") -> str:
    between = "" if score["95 %"] is None else f" [{score['95 %'][0]:{sign}.3f}, {score['95 %'][1]:{sign}.3f}]"
    return f"{score['mean']:{sign}.3f}{between}"


def _weights(row: dict[str, Any]) -> str:
    if "weight on distractors" not in row:
        return "–"
    return f"{row['weight on distractors']['mean']:.3f} ({row['1/n on distractors']['mean']:.3f})"
