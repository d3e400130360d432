"""`mmdiff benchmark fusion`: accuracy against the number of photos, each entry and seed stored as it comes."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from mmdiff.benchmarks.fusion.classifier import Classifiers, Retrieval
from mmdiff.benchmarks.fusion.learning import BEST, ENTRIES, FINE_TUNED, SINGLE, ZERO_SHOT, Answers, Way
from mmdiff.benchmarks.fusion.scores import best, between_seeds, mass, scores
from mmdiff.benchmarks.fusion.settings import Settings
from mmdiff.benchmarks.fusion.vlm import LanguageModels
from mmdiff.evaluation.report import circumstances
from mmdiff.modalities.fusion import FUSIONS

PROTOCOL = 2  # stored parts of another one are not taken
ALL = "all"  # cells together: the mean over those with two photos and more
SCORES = ("accuracy", "precision", "recall", "weight on distractors", "1/n on distractors")
WAYS: dict[str, type[Way]] = {"classifier": Classifiers, "retrieval": Retrieval, "vlm": LanguageModels}
Part = dict[str, Any]  # {"entry", "seed", "seconds", "scores": [{"task", "views", "distractors", …}]}


def results(settings: Settings, folder: Path, progress: bool = True) -> list[Part]:
    """Every entry with every seed; what is stored is read, the rest is computed and stored.

    Args:
        settings: of the experiment.
        folder: of the parts, and of what was pretrained.
    """
    key = hashlib.sha256(json.dumps(_facts(settings), sort_keys=True).encode()).hexdigest()[:12]
    room = folder / f"{settings.name}-{key}"
    way = WAYS[settings.way](settings, room)
    found = []
    wanted = [(entry, seed) for seed in range(settings.seeds) for entry in ENTRIES]
    with tqdm(wanted, disable=not progress, unit="part") as bar:
        for entry, seed in bar:
            bar.set_postfix_str(f"{entry}, seed {seed}")
            path = room / "parts" / f"{entry.replace(', ', '-').replace(' ', '-')}-{seed}.json"
            if not path.is_file():
                _write(_computed(way, entry, seed), path)
            found.append(json.loads(path.read_text()))
    return found


def tree(settings: Settings, parts: list[Part]) -> dict[str, Any]:
    """{"manifest", "rows", "gains"}, plain dicts and lists.

    A row is an entry on a task at a number of photos and a share of distractors, or at all of them; a gain is the
    accuracy of a fusion minus that of photos in one large image, by seed.
    """
    by = {(part["entry"], part["seed"]): part["scores"] for part in parts}
    seeds = sorted({seed for _, seed in by})
    cells: list[tuple[Any, Any]] = [(ALL, ALL), *((views, ALL) for views in settings.test.views)]
    cells += [(ALL, share) for share in settings.test.distractors]
    cells += [(views, share) for share in settings.test.distractors for views in settings.test.views]
    rows = [
        {"task": task, "entry": entry, "photos": views, "distractors": share}
        | _row([_kept(by[entry, seed], task, views, share) for seed in seeds])
        for task in settings.tasks
        for entry in ENTRIES
        for views, share in cells
    ]
    return {"manifest": _manifest(settings, parts), "rows": rows, "gains": list(_gains(settings, rows))}


def text(found: dict[str, Any]) -> str:
    """The table of every task, and the gains."""
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in found["manifest"].items()]
    for task in dict.fromkeys(row["task"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["task"] == task]
        counts = list(dict.fromkeys(row["photos"] for row in rows if row["photos"] != ALL))
        shares = list(dict.fromkeys(row["distractors"] for row in rows if row["distractors"] != ALL))
        heads = [*(f"n = {count}" for count in counts), *(f"{share:.0%} distractors" for share in shares)]
        table = [["", "accuracy", "precision", "recall", *heads, "weight on distractors (1/n)"]]
        for entry in ENTRIES:
            own = {(row["photos"], row["distractors"]): row for row in rows if row["entry"] == entry}
            each = [own[count, ALL] for count in counts] + [own[ALL, share] for share in shares]
            told = own[ALL, ALL]
            table.append(
                [
                    entry,
                    _shown(told["accuracy"]),
                    *(f"{told[name]['mean']:.3f}" for name in ("precision", "recall")),
                    *(f"{row['accuracy']['mean']:.3f}" for row in each),
                    _weights(told),
                ]
            )
        lines += ["", f"{task}: means over the sets of two photos and more [95 % between seeds]", *_aligned(table)]
    table = [["accuracy minus that of", ZERO_SHOT, FINE_TUNED]]
    for row in found["gains"]:
        table.append([f"{row['task']}: {row['entry']}", _shown(row[ZERO_SHOT], "+"), _shown(row[FINE_TUNED], "+")])
    return "\n".join([*lines, "", *_aligned(table)])


# --------------------------------------------------------------------------------------------------------------- parts


def _facts(settings: Settings) -> dict[str, Any]:
    """All that a part is a function of, but for entry and seed."""
    return {"protocol": PROTOCOL} | settings.model_dump(mode="json", exclude={"name", "seeds"})


def _computed(way: Way, entry: str, seed: int) -> Part:
    started = time.perf_counter()
    rows = []
    for (views, share), answers in way.answers(entry, seed):
        image_sets = way.test((views, share))
        for task, given in answers.items():
            kind = way.settings.tasks[task].kind
            row = {"task": task, "views": views, "distractors": share, "sets": len(image_sets.photos)}
            row["answers"] = len(set(image_sets.answers[task]))
            row |= scores(kind, best(kind, given.texts, image_sets.answers[task]), image_sets.answers[task])
            rows.append(row | _mass(given, image_sets.distractors))
    return {"entry": entry, "seed": seed, "seconds": time.perf_counter() - started, "scores": rows}


def _mass(given: Answers, distractors: list[list[bool]]) -> dict[str, float]:
    return {} if given.weights is None else mass(given.weights, distractors)


def _write(part: Part, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(part, indent=1) + "\n")
    partial.replace(path)


# ---------------------------------------------------------------------------------------------------------------- rows


def _kept(rows: list[dict[str, Any]], task: str, views: Any, share: Any) -> list[dict[str, Any]]:
    """The cells that a row tells of; a single photo is no set, unless it is asked for or there is nothing else."""
    own = [row for row in rows if row["task"] == task and share in (ALL, row["distractors"])]
    if views != ALL:
        return [row for row in own if row["views"] == views]
    return [row for row in own if row["views"] > 1] or own


def _row(cells: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Of every seed's cells: {score: mean, interval and values by seed}."""
    names = [name for name in SCORES if any(name in cell for cell in cells[0])]
    return {
        name: between_seeds([statistics.fmean(cell[name] for cell in own if name in cell) for own in cells])
        for name in names
    }


def _gains(settings: Settings, rows: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    whole = {(row["task"], row["entry"]): row for row in rows if (row["photos"], row["distractors"]) == (ALL, ALL)}
    for task in settings.tasks:
        for entry in FUSIONS:
            own = whole[task, entry]["accuracy"]["by seed"]
            differences = {
                base: [one - other for one, other in zip(own, whole[task, base]["accuracy"]["by seed"])]
                for base in (ZERO_SHOT, FINE_TUNED)
            }
            yield {"task": task, "entry": entry} | {name: between_seeds(each) for name, each in differences.items()}


def _manifest(settings: Settings, parts: list[Part]) -> dict[str, Any]:
    """What a reader needs to believe a number, and to make it again."""
    return circumstances(torch.device("cpu")) | {
        "experiment": settings.name,
        "seeds": list(range(settings.seeds)),
        "held-out sets per number of photos and share of distractors": parts[0]["scores"][0]["sets"],
        "different answers among them": parts[0]["scores"][0]["answers"],
        "intervals": "95 % (Student) of the mean over seeds; a seed decides pretrained weights, fusion and batches",
        BEST: "of each photo's answer the one nearest to the truth, which a person without the truth cannot choose",
        SINGLE: "the first of each set, which are in random order",
        "distractors": "every set has a right photo at least, so that there is none in a set of one",
        "hours": round(sum(part["seconds"] for part in parts) / 3600, 4),
        "settings": settings.model_dump(mode="json"),
    }


# ---------------------------------------------------------------------------------------------------------------- text


def _shown(found: dict[str, Any], sign: str = "") -> str:
    between = "" if found["95 %"] is None else f" [{found['95 %'][0]:{sign}.3f}, {found['95 %'][1]:{sign}.3f}]"
    return f"{found['mean']:{sign}.3f}{between}"


def _weights(row: dict[str, Any]) -> str:
    if "weight on distractors" not in row:
        return "–"
    return f"{row['weight on distractors']['mean']:.3f} ({row['1/n on distractors']['mean']:.3f})"


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
