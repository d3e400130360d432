"""`mmdiff benchmark fusion`: accuracy against the number of photos, each entry and seed stored as it comes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from mmdiff.benchmarks.cache import key_of, stored_json, write_results
from mmdiff.benchmarks.fusion.classifier import Classifiers, Retrieval
from mmdiff.benchmarks.fusion.entries import ASKED, BASES, DROPPED, NOTES
from mmdiff.benchmarks.fusion.learning import Answers, Learner
from mmdiff.benchmarks.fusion.plan import plan
from mmdiff.benchmarks.fusion.report import ALL, text
from mmdiff.benchmarks.fusion.scores import best, between_seeds, mass
from mmdiff.benchmarks.fusion.scores import scores as score
from mmdiff.benchmarks.fusion.settings import Settings, load_settings
from mmdiff.benchmarks.fusion.vlm import LanguageModels
from mmdiff.data.sources import refuse_hub
from mmdiff.errors import InputError
from mmdiff.evaluation.report import circumstances
from mmdiff.modalities.fusion import FUSIONS
from mmdiff.plots import accuracy_by_photos
from mmdiff.trust import refuse_custom

PROTOCOL = 3  # stored parts of another one are not taken
SCORES = ("accuracy", "precision", "recall", "weight on distractors", "1/n on distractors")
LEARNERS: dict[str, type[Learner]] = {"classifier": Classifiers, "retrieval": Retrieval, "vlm": LanguageModels}
ANSWER = "tokens of its prompts without padding, seconds of generating in batches with the encoder, medians"
COSTS = ("prompt tokens", "seconds per answer")
Part = dict[str, Any]  # {"entry", "seed", "seconds", "scores": [{"task", "views", "distractors", …}], "costs": alike}


@dataclass(frozen=True)
class Request:
    """What is compared.

    Attributes:
        experiments: YAML files.
        overrides: settings as key=value, of all of them.
        out: folder of parts and results.
        threads: CPU threads; None: torch's own number.
        trust: whether experiments may name code and contact the hub.
        dry_run: whether to say what would be compared, and compute nothing.
        device: cpu, or cuda for a vision-language model.
    """

    experiments: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    out: Path = Path("runs/fusion")
    threads: int | None = None
    trust: bool = False
    dry_run: bool = False
    device: str = "cpu"


def run(request: Request) -> Iterator[str]:
    """The table of each experiment, and the files that were written; or the plan of each.

    Raises:
        InputError: an experiment does not fit; before the first one starts.
    """
    experiments = [load_settings(path, list(request.overrides)) for path in request.experiments]
    names = [settings.name for settings in experiments]
    for settings in experiments:
        if names.count(settings.name) > 1:
            raise InputError("EXPERIMENT", settings.name, "is the name of two experiments")
        if not request.trust:
            refuse_custom(settings.encoder, "fusion.encoder")
            refuse_hub("fusion.data", settings.data.source, settings.data.options)
        _learner(settings, request.out, request.device).entries(opened=not request.dry_run)  # refuses
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    if request.dry_run:
        for settings in experiments:
            parts = _parts(_learner(settings, request.out), opened=False)
            yield plan(settings, list(parts.values()))
        return
    for settings in experiments:
        scores = tree(settings, results(settings, request.out, device=request.device), request.device)
        draw = partial(accuracy_by_photos, scores["rows"])
        files = write_results(request.out, settings.name, scores, text(scores), draw)
        yield "\n".join([text(scores), *(f"wrote {path}" for path in files.values())])


def results(settings: Settings, folder: Path, progress: bool = True, device: str = "cpu") -> list[Part]:
    """Every entry with every seed; what is stored is read, the rest is computed and stored.

    Args:
        settings: of the experiment.
        folder: of the parts, and of what was pretrained.
        progress: whether to show progress bars.
        device: see `Request`.
    """
    learner = _learner(settings, folder, device)
    parts = []
    with tqdm(_parts(learner).items(), disable=not progress, unit="part") as bar:
        for (entry, seed), path in bar:
            bar.set_postfix_str(f"{entry}, seed {seed}")
            parts.append(stored_json(path, partial(_computed, learner, entry, seed)))
    return parts


def tree(settings: Settings, parts: list[Part], device: str = "cpu") -> dict[str, Any]:
    """{"manifest", "rows", "gains", "headroom", "costs"}, plain dicts and lists.

    A row is an entry on a task at a number of photos and a share of distractors, or at all of them. A gain is the
    accuracy of a fusion minus that of each of `BASES`, by seed, at all numbers of photos. The expected headroom is the
    gain of an oracle that takes the distractors out, over the mean: where it is 0, a tie says nothing. A cost is the
    median over tasks, shares and seeds, of an entry at a number of photos.
    """
    entries = list(dict.fromkeys(part["entry"] for part in parts))
    scores = pd.DataFrame([{"entry": p["entry"], "seed": p["seed"]} | row for p in parts for row in p["scores"]])
    groups = scores.groupby(["task", "entry"])
    shares: list[Any] = [ALL, *settings.test.distractors]
    cells = [(views, share) for share in shares for views in (ALL, *settings.test.views)]
    rows = [
        {"task": task, "entry": entry, "photos": views, "distractors": share} | _row(_kept(own, views, share))
        for task in settings.tasks
        for entry in entries
        for own in (groups.get_group((task, entry)),)
        for views, share in cells
    ]
    gains = [
        {"task": task, "entry": entry, "distractors": share} | _gains(rows, task, entry, share)
        for task in settings.tasks
        for entry in entries
        if entry in (*FUSIONS, *ASKED)
        for share in shares
    ]
    headroom = [
        {"task": task, "distractors": share} | gain["mean"]
        for task in settings.tasks
        for share in shares
        if "mean" in (gain := _gains(rows, task, DROPPED, share))
    ]
    found = {"rows": rows, "gains": gains, "headroom": headroom, "costs": list(_costs(parts))}
    return {"manifest": _manifest(settings, parts, entries, device)} | found


# --------------------------------------------------------------------------------------------------------------- parts


def _facts(settings: Settings) -> dict[str, Any]:
    """All that a part is a function of, but for entry and seed."""
    return {"protocol": PROTOCOL} | settings.model_dump(mode="json", exclude={"name", "seeds", "entries"})


def _learner(settings: Settings, folder: Path, device: str = "cpu") -> Learner:
    room = folder / f"{settings.name}-{key_of(_facts(settings))[:12]}"
    return LEARNERS[settings.learner](settings, room, device)


def _parts(learner: Learner, opened: bool = True) -> dict[tuple[str, int], Path]:
    """{(entry, seed): its file}, in the order of computation; ``opened``: as of `Learner.several`."""
    parts = learner.folder / "parts"
    return {
        (entry, seed): parts / f"{entry.replace(', ', '-').replace(' ', '-')}-{seed}.json"
        for seed in range(learner.settings.seeds)
        for entry in learner.entries(opened)
    }


def _computed(learner: Learner, entry: str, seed: int) -> Part:
    started = time.perf_counter()
    rows, costs = [], []
    for (views, share), answers in learner.answers(entry, seed):
        image_sets = learner.test((views, share))
        for task, answer in answers.items():
            kind, cell = learner.settings.tasks[task].kind, {"task": task, "views": views, "distractors": share}
            row = cell | {"sets": len(image_sets.photos), "answers": len(set(image_sets.answers[task]))}
            row |= score(kind, best(kind, answer.texts, image_sets.answers[task]), image_sets.answers[task])
            rows.append(row | _mass(answer, image_sets.distractors))
            costs += [cell | answer.cost] if answer.cost else []
    return {"entry": entry, "seed": seed, "seconds": time.perf_counter() - started, "scores": rows, "costs": costs}


def _mass(answers: Answers, distractors: list[list[bool]]) -> dict[str, float]:
    return {} if answers.weights is None else mass(answers.weights, distractors)


# ---------------------------------------------------------------------------------------------------------------- rows


def _kept(scores: pd.DataFrame, views: Any, share: Any) -> pd.DataFrame:
    """Scores of a row; a single photo is no set, unless it is asked for or there is nothing else."""
    own = scores if share == ALL else scores[scores["distractors"] == share]
    if views != ALL:
        return own[own["views"] == views]
    sets = own[own["views"] > 1]
    return own if sets.empty else sets


def _row(scores: pd.DataFrame) -> dict[str, Any]:
    """{score: mean, interval and values by seed}; scores that no cell has are left out."""
    by_seed = scores.groupby("seed")[[name for name in SCORES if name in scores]].mean().dropna(axis="columns")
    return {name: between_seeds(by_seed[name].tolist()) for name in by_seed}


def _gains(rows: list[dict[str, Any]], task: str, entry: str, share: Any) -> dict[str, Any]:
    """{base: mean, interval and values by seed of the entry's accuracy minus that of the base}."""
    at = {row["entry"]: row for row in rows if (row["task"], row["photos"], row["distractors"]) == (task, ALL, share)}
    own = at[entry]["accuracy"]["by seed"] if entry in at else []
    return {
        base: between_seeds([one - other for one, other in zip(own, at[base]["accuracy"]["by seed"], strict=True)])
        for base in BASES
        if own and base in at and base != entry
    }


def _costs(parts: list[Part]) -> Iterator[dict[str, Any]]:
    """Parts of earlier versions have none."""
    costs = [{"entry": part["entry"]} | cost for part in parts for cost in part.get("costs", [])]
    if costs:
        for (entry, views), own in pd.DataFrame(costs).groupby(["entry", "views"], sort=False):
            yield {"entry": entry, "photos": int(views)} | {name: float(own[name].median()) for name in COSTS}


def _manifest(settings: Settings, parts: list[Part], entries: list[str], device: str) -> dict[str, Any]:
    """What a reader needs to believe a number, and to make it again."""
    return circumstances(torch.device(device)) | {
        "experiment": settings.name,
        "seeds": list(range(settings.seeds)),
        "held-out sets per number of photos and share of distractors": parts[0]["scores"][0]["sets"],
        "different answers among them": parts[0]["scores"][0]["answers"],
        "intervals": "95 % (Student) of the mean over seeds; a seed decides pretrained weights, fusion and batches",
        **{entry: note for entry, note in NOTES.items() if entry in entries},
        "distractors": "every set has a right photo at least, so that there is none in a set of one",
        **({"an answer": ANSWER} if any(part.get("costs") for part in parts) else {}),
        "hours": round(sum(part["seconds"] for part in parts) / 3600, 4),
        "settings": settings.model_dump(mode="json"),
    }
