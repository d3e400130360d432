"""The fusion benchmark's results as text."""

from __future__ import annotations

from typing import Any

from mmdiff.benchmarks.fusion.entries import BASES, DROPPED
from mmdiff.evaluation.tables import facts, grouped, table

ALL = "all"  # cells together: the mean over those with two photos and more


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
        lines += [*_headroom(tree, task), "", *_gains(tree, task)]
    return "\n".join([*lines, *_costs(tree["costs"])])


def _costs(costs: list[dict[str, Any]]) -> list[str]:
    if not costs:
        return []
    counts = list(dict.fromkeys(cost["photos"] for cost in costs))
    cells = []
    for (entry,), own in grouped(costs, [(cost["entry"],) for cost in costs]):
        at = {cost["photos"]: f"{cost['prompt tokens']:g}, {1e3 * cost['seconds per answer']:.2f}" for cost in own}
        cells.append([entry, *(at[count] for count in counts)])
    return ["", *table(["an answer: prompt tokens, ms", *(f"n = {count}" for count in counts)], cells)]


def _headroom(tree: dict[str, Any], task: str) -> list[str]:
    own = [f"{_share(row['distractors'])}: {_score(row, '+')}" for row in tree["headroom"] if row["task"] == task]
    return ["", f"expected headroom ({DROPPED} minus mean), by share of distractors: {', '.join(own)}"] if own else []


def _gains(tree: dict[str, Any], task: str) -> list[str]:
    """Differences are paired by seed."""
    rows = [row for row in tree["gains"] if row["task"] == task and any(base in row for base in BASES)]
    bases = [base for base in BASES if any(base in row for row in rows)]
    cells = [
        [row["entry"], _share(row["distractors"]), *(_score(row[base], "+") if base in row else "–" for base in bases)]
        for row in rows
    ]
    return table(["accuracy minus that of", "distractors", *bases], cells)


def _share(share: Any) -> str:
    return share if share == ALL else f"{share:.0%}"


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
