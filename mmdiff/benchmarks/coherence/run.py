"""`mmdiff benchmark coherence`: one part per side, missing rate and seed, each stored as it comes."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmdiff.benchmarks.cache import key_of, stored_json, write_results
from mmdiff.benchmarks.coherence.classifiers import BATCH, EPOCHS, Classifier, classifiers
from mmdiff.benchmarks.coherence.report import SHOWN, curves, gallery, text
from mmdiff.benchmarks.coherence.request import (
    OURS,
    SIDES,
    Request,
    check_experiment,
    check_numbers,
    chosen_sides,
)
from mmdiff.benchmarks.coherence.scores import Images, conditional_coherence, joint_coherence
from mmdiff.benchmarks.coherence.sides import Budget, Task, Trained
from mmdiff.benchmarks.fusion.scores import between_seeds
from mmdiff.benchmarks.machine import machine
from mmdiff.benchmarks.training import endless
from mmdiff.build import build_model, build_table, open_rows
from mmdiff.config import load_config
from mmdiff.data import Rows, Table
from mmdiff.data.sources import refuse_hub
from mmdiff.errors import InputError
from mmdiff.metrics.features import Features, distances, extractor
from mmdiff.randomness import fold
from mmdiff.resolve import resolve
from mmdiff.trust import refuse_custom

PROTOCOL = 1  # stored parts of another one are not taken
Part = dict[str, Any]


def run(request: Request) -> Iterator[str]:
    """What is being done, then the table and the files.

    Raises:
        InputError: something does not fit; before anything is trained.
    """
    sides = chosen_sides(request)
    check_numbers(request)
    benchmark = Benchmark(request)
    features = next(iter(benchmark.features.values()))[0]  # refused before anything is trained
    accuracy = ", ".join(f"{name} {share:.3f}" for name, share in benchmark.accuracy.items())
    yield f"judges, accuracy on held-out rows: {accuracy}; Fréchet distances on {features.name}"
    wanted = [(side, share, seed) for share in request.missing for seed in range(request.seeds) for side in sides]
    parts = []
    with tqdm(wanted, unit="part") as bar:
        for side, share, seed in bar:
            bar.set_postfix_str(f"{side}, {share:.0%} missing, seed {seed}")
            parts.append(benchmark.part(side, share, seed))
    results = tree(benchmark, sides, parts)
    files = write_results(request.out, benchmark.config.name, results, text(results), partial(curves, results["rows"]))
    yield "\n".join([text(results), *(f"wrote {path}" for path in files.values())])


class Benchmark:
    """What does not depend on a side: rows, labels, judges, the folder of parts."""

    def __init__(self, request: Request) -> None:
        config = endless(load_config(request.experiment, list(request.overrides)))
        if not request.trust:
            refuse_custom(config.model_dump()["modalities"])
            refuse_hub("data", str(config.data.source), config.data.options)
        check_experiment(config)
        train, held_out = open_rows(config, request.trust)
        self.request, self.config = request, resolve(config, train)
        self.names = [self.config.anchor, *self.config.auxiliary()]
        model = build_model(self.config, initial_weights=False)
        self.table = build_table(self.config, model, train)
        labels = [_labels(rows, request.label, self.config.evaluate.max_rows) for rows in (train, held_out)]
        self.classes = int(max(own.max() for own in labels)) + 1
        self.real, self.labels = _whole(self.table, self.names, labels[0])
        held_table = build_table(self.config, model, held_out.select(list(range(min(request.rows, len(held_out))))))
        self.truth, self.truth_labels = _whole(held_table, self.names, labels[1])
        facts = {"protocol": PROTOCOL, "data": self.config.data.model_dump(mode="json"), "label": request.label}
        facts |= {"evaluate": self.config.evaluate.model_dump(mode="json", include={"features", "max_rows"})}
        facts |= {"modalities": {n: m.model_dump(mode="json") for n, m in self.config.modalities.items()}}
        self.folder = request.out / f"{self.config.name}-{key_of(facts)[:12]}"

    @cached_property
    def judges(self) -> dict[str, Classifier]:
        return classifiers(self.real, self.labels, self.classes, self.folder / "judges.safetensors")

    @cached_property
    def features(self) -> dict[str, tuple[Features, np.ndarray]]:
        """{modality: (what the distance is measured on, that of the real training rows)}."""
        made = {name: extractor(self.config.evaluate.features, images) for name, images in self.real.items()}
        return {name: (features, features(self.real[name])) for name, features in made.items()}

    @cached_property
    def accuracy(self) -> dict[str, float]:
        """Of each judge on real held-out rows."""
        return {
            name: float((self.judges[name].read(values).argmax(1) == self.truth_labels).double().mean())
            for name, values in self.truth.items()
        }

    def part(self, side: str, share: float, seed: int) -> Part:
        """A side at a missing rate with a seed, from the folder where it stands there."""
        factor = self.chosen(side, share)
        return self._stored(side, share, Budget(self.request.seconds, factor, seed))

    def chosen(self, side: str, share: float) -> float:
        """The factor of the learning rate that is best in short runs, by coherence on training rows."""
        factors = self.request.learning_rates
        if len(factors) == 1:
            return factors[0]
        short = [self._stored(side, share, Budget(self.request.seconds / 4, f, 0), tuning=True) for f in factors]
        return factors[max(range(len(factors)), key=lambda k: short[k]["mean"])]

    def _stored(self, side: str, share: float, budget: Budget, tuning: bool = False) -> Part:
        own = self.config.model_dump(
            mode="json", include={"backbone", "scheduler", "states", "loss", "train", "sample"}
        )
        batch = {"batch size": self.config.train.batch_size}
        facts = {"side": side, "share": share, "budget": budget._asdict(), "rows": self.request.rows, "tuning": tuning}
        key = key_of(facts | {"settings": own if side == OURS else batch, "judges": EPOCHS})[:12]
        stem = f"{side}-{share:g}-{budget.seed}{'-tuning' if tuning else ''}-{key}"
        compute = partial(self._computed, side, share, budget, stem, tuning)
        return stored_json(self.folder / "parts" / f"{stem}.json", compute)

    def _computed(self, side: str, share: float, budget: Budget, stem: str, tuning: bool) -> Part:
        table = copy.copy(self.table)
        table.missing = {name: share for name in self.config.auxiliary() if share}
        trained = SIDES[side](Task(self.config, table), budget)
        scores = self._scored(trained, budget.seed, stem, tuning)
        return {"side": side, "missing": share, "seed": budget.seed, "factor": budget.factor} | trained.facts | scores

    def _scored(self, trained: Trained, seed: int, stem: str, tuning: bool) -> dict[str, Any]:
        count = len(self.truth_labels)
        truth, labels = self.truth, self.truth_labels
        if tuning:
            truth, labels = {n: v[:count] for n, v in self.real.items()}, self.labels[:count]
        drawn = trained.joint(count, fold(seed, 0, "coherence/joint"))
        rest = partial(trained.rest, seed=fold(seed, 0, "coherence/rest"))
        joint, sizes = joint_coherence(drawn, self.judges), conditional_coherence(rest, truth, labels, self.judges)
        mean = statistics.mean([joint, *(size["coherence"] for size in sizes)])
        scores = {"joint": joint, "given": sizes, "mean": mean, "samples": count}
        if tuning:
            return scores
        given = {self.names[0]: truth[self.names[0]][:SHOWN]}
        gallery(drawn, given | rest(given), self.names, self.folder / "samples" / f"{stem}.png")
        return scores | {"distance": self._distances(drawn)}

    def _distances(self, drawn: Images) -> dict[str, dict[str, float]]:
        """{modality: Fréchet distance of joint samples to training rows, and of real to real}."""
        return {
            name: distances(features(drawn[name]), real) | {"features": features.name}
            for name, (features, real) in self.features.items()
        }


def tree(benchmark: Benchmark, sides: tuple[str, ...], parts: list[Part]) -> dict[str, Any]:
    """{"manifest", "rows", "parts"}, plain dicts and lists; a row is a side at a missing rate, over the seeds."""
    request, rows = benchmark.request, []
    for share in request.missing:
        for side in sides:
            own = [part for part in parts if (part["side"], part["missing"]) == (side, share)]
            rows.append({"side": side, "missing": share} | _row(own))
    real = {"joint": joint_coherence(benchmark.truth, benchmark.judges), "accuracy": benchmark.accuracy}
    manifest = machine() | {
        "experiment": benchmark.config.name,
        "data": str(benchmark.config.data.source),
        "training rows": len(benchmark.table),
        "held-out rows": len(benchmark.truth_labels),
        "CPU seconds of a training": request.seconds,
        "seeds": request.seeds,
        "factors of the learning rate": list(request.learning_rates),
        "judges": f"a classifier per modality, {EPOCHS} epochs of {len(benchmark.labels)} real rows, batch {BATCH}",
        "judges on real held-out rows": benchmark.accuracy,
        "all judges agree on real held-out rows": real["joint"],
        "intervals": "95 % (Student) of the mean over seeds",
        "solver steps of mmdiff": benchmark.config.sample.steps,
    }
    return {"manifest": manifest, "rows": rows, "parts": parts}


def _row(parts: list[Part]) -> dict[str, Any]:
    sizes = [size["given"] for size in parts[0]["given"]]
    names = list(parts[0]["distance"])
    of_size = {size: [p["given"][k] for p in parts] for k, size in enumerate(sizes)}
    return {
        "joint": between_seeds([part["joint"] for part in parts]),
        "conditional": {size: between_seeds([one["coherence"] for one in own]) for size, own in of_size.items()},
        "label accuracy": {
            size: between_seeds([one["label accuracy"] for one in own]) for size, own in of_size.items()
        },
        "distance": {name: between_seeds([part["distance"][name]["FID"] for part in parts]) for name in names},
        "distance, real against real": {
            name: between_seeds([part["distance"][name]["FID, real against real"] for part in parts]) for name in names
        },
        "features": parts[0]["distance"][names[0]]["features"],
        **{key: statistics.mean(part[key] for part in parts) for key in ("steps", "CPU seconds", "parameters")},
        "learning rate": parts[0]["learning rate"],
        "diverged": sum(bool(part.get("diverged")) for part in parts),
    }


# --------------------------------------------------------------------------------------------------------------- data


def _labels(rows: Rows, column: str, limit: int) -> Tensor:
    """(n,) classes of the first rows.

    Raises:
        InputError: there is no such column, or it has something else than classes.
    """
    if column not in rows.column_names:
        raise InputError("--label", column, f"the source has the columns {', '.join(rows.column_names)}")
    chosen = rows.select_columns([column])
    values = [chosen[index][column] for index in range(min(limit, len(rows)))]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10_000:
            raise InputError("--label", column, f"needs a class 0 … 9999 in every row; one has {value!r}")
    return torch.tensor(values)


def _whole(table: Table, names: list[str], labels: Tensor) -> tuple[Images, Tensor]:
    """The rows in which no image is missing, and their classes.

    Raises:
        InputError: fewer than 4 of them.
    """
    batch = table.all(len(labels))
    present = torch.stack([batch.present[name] for name in names]).all(dim=0)
    if int(present.sum()) < 4:
        raise InputError("data", int(present.sum()), "rows have all images; 4 are needed, held out and in training")
    return {name: batch.values[name][present] for name in names}, labels[: len(present)][present]
