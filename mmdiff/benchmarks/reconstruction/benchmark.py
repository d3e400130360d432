"""Masked reconstruction: the same images, holes and scores for every method. Each part is stored when it is done."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from mmdiff.benchmarks.cache import key_of, stored, stored_json
from mmdiff.benchmarks.reconstruction.methods import DEFAULTS, METHODS, Entry, Options, Setting, entries
from mmdiff.benchmarks.reconstruction.trained import Trained
from mmdiff.build import build_table, open_rows
from mmdiff.config import Config
from mmdiff.data import Rows
from mmdiff.data.masking import known_masks
from mmdiff.errors import InputError
from mmdiff.evaluation.holes import SEED, pasted, per_image
from mmdiff.evaluation.judges import complete
from mmdiff.metrics.lpips import Perceptual
from mmdiff.randomness import fold

PROTOCOL = 1  # of the scores; stored parts of another one are not taken
TUNING = 16  # training images on which a method's free settings are chosen, holes of every pattern and size
CHOSEN_BY = "LPIPS, hole"  # their mean
RAW = "not pasted"


class HoleSet(NamedTuple):
    """Holes of one pattern and size: ``known`` (n, 1, H, W), 1 = known."""

    pattern: str
    ratio: float
    known: Tensor

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {"seed": SEED, "sha256": digest(self.known.bool()), "hidden share": float(1 - self.known.mean())}


class Cell(NamedTuple):
    """One method on one set of holes with one seed: ``fills`` uint8 (n, C, H, W) as they came, ``scores`` (n,) by name,
    ``seconds`` of wall time and network ``evaluations``, both per image."""

    fills: Tensor
    scores: dict[str, Tensor]
    seconds: float
    evaluations: float


class Result(NamedTuple):
    """All seeds of an entry on a set of holes."""

    entry: Entry
    holes: HoleSet
    cells: list[Cell]


class Benchmark:
    """What does not depend on a method: images, holes, LPIPS, and the folder of the parts.

    Args:
        runs: of one data set.
        folder: parts are kept there, and an interrupted benchmark is continued from them.
        patterns, ratios: of the holes.
        images: how many held-out images.
        seeds: how many, of what is drawn.
        methods: names of `METHODS`, or None: all that the runs can do.
        options: the methods' rows.
        hub: whether the data may come from the hub.

    Raises:
        InputError: the runs' data differ, a name is unknown, or LPIPS has no weights.
    """

    def __init__(
        self,
        runs: Sequence[Trained],
        folder: Path,
        patterns: Sequence[str] = ("squares",),
        ratios: Sequence[float] = (0.5,),
        images: int = 64,
        seeds: int = 1,
        methods: Sequence[str] | None = None,
        options: Options = DEFAULTS,
        hub: bool = True,
    ) -> None:
        _check_one_data_set(runs)
        self.runs, self.folder, self.seeds, self.options = list(runs), folder, range(seeds), options
        first = runs[0]
        self.config, lpips = first.config, first.config.evaluate.lpips
        self.perceptual = Perceptual(lpips.net, lpips.backbone, lpips.heads)
        self.device = first.pipeline.device
        self._train, held_out = open_rows(self.config, hub)
        self.truth, self.positions = _images(first, held_out, images)
        self.holes = [
            HoleSet(pattern, ratio, known_masks(pattern, ratio, *self.truth.shape[2:], SEED, self.positions))
            for ratio in ratios
            for pattern in patterns
        ]
        self.chosen: dict[str, dict[str, Any]] = {}  # what training images decided
        self.images_digest = digest(_bytes(self.truth))
        self.entries = [self._settled(entry) for entry in entries(runs, options, methods)]

    def results(self, progress: bool = True) -> list[Result]:
        """Every entry on every set of holes; what is stored is read, the rest is computed and stored."""
        wanted = [(entry, holes) for holes in self.holes for entry in self.entries]
        total = sum(len(self._seeds(entry)) for entry, _ in wanted)
        results = []
        with tqdm(total=total, disable=not progress, unit="part") as bar:
            for entry, holes in wanted:
                bar.set_postfix_str(f"{holes.pattern} {holes.ratio:g}, {entry.label}")
                cells = []
                for seed in self._seeds(entry):
                    cells.append(self.cell(entry, holes, seed))
                    bar.update()
                results.append(Result(entry, holes, cells))
        return results

    def _seeds(self, entry: Entry) -> Iterable[int]:
        return self.seeds if METHODS[entry.method].seeded else (0,)

    def cell(self, entry: Entry, holes: HoleSet, seed: int) -> Cell:
        """A part, from the folder where it stands there."""
        key = self._key(entry, seed, images=self.images_digest, holes=holes.facts()["sha256"])
        run = entry.run.name if entry.run else "baseline"
        name = f"{run}-{entry.method}-{holes.pattern}-{holes.ratio:g}-{seed}-{key[:16]}.safetensors"
        compute = partial(self._computed, entry, self.truth, holes.known, seed)
        return _read(stored(self.folder / "parts" / name, lambda path: _save(compute(), path, key)), key)

    def _key(self, entry: Entry, seed: int, **images: str) -> str:
        """A hash of all that a part is a function of."""
        facts = {
            "protocol": PROTOCOL,
            "weights": entry.run.digest if entry.run else None,
            "method": entry.method,
            "setting": entry.setting,
            "seed": seed,
            "scores": self.perceptual.facts(),
            **images,
        }
        return key_of(facts)

    def _computed(self, entry: Entry, truth: Tensor, known: Tensor, seed: int) -> Cell:
        started = time.perf_counter()
        images, evaluations = self._filled(entry, truth, known, seed)
        seconds = (time.perf_counter() - started) / len(truth)
        fills = _bytes(images)  # as a picture is kept, so that a stored one has the scores that are stored with it
        images = _floats(fills, truth)
        filled = pasted(images, truth, known)
        scores = per_image(filled, truth, known, self.perceptual)
        untouched = torch.equal(images, filled)  # most methods put known pixels back by themselves
        raw = scores if untouched else per_image(images, truth, known, self.perceptual)
        return Cell(fills, scores | {f"{k}, {RAW}": v for k, v in raw.items()}, seconds, evaluations)

    def _filled(self, entry: Entry, truth: Tensor, known: Tensor, seed: int) -> tuple[Tensor, float]:
        """(images (n, C, H, W) as the method leaves them, network evaluations per image); batches do not matter."""
        method, size = METHODS[entry.method], self.config.sample.batch_size
        generators = [torch.Generator().manual_seed(fold(seed, row, "restoration")) for row in range(len(truth))]

        def fill(rows: slice) -> Tensor:
            pixels, kept = (truth * known)[rows].to(self.device), known[rows].to(self.device)
            return method.fill(entry.run, pixels, kept, generators[rows], **entry.setting).float().cpu()

        parts = [slice(start, start + size) for start in range(0, len(truth), size)]
        if entry.run is None:
            return torch.cat([fill(part) for part in parts]), 0.0
        with entry.run.counting() as batches:
            images = torch.cat([fill(part) for part in parts])
        return images, sum(batches) / len(truth)

    # ------------------------------------------------------------------------------------------- on training images

    @cached_property
    def _tuning(self) -> tuple[Tensor, Tensor]:
        """(training images, known pixels)."""
        truth, positions = _images(self.runs[0], self._train, TUNING)
        return truth, known_masks("mixed", (0.1, 0.75), *truth.shape[2:], SEED + 1, positions)

    def _settled(self, entry: Entry) -> Entry:
        """The entry with its free settings: those of the method's first row that are best on training images."""
        method = METHODS[entry.method]
        if not method.candidates:
            return entry
        name = f"{entry.run.name}: {entry.method}" if entry.run else entry.method
        if name not in self.chosen:
            self.chosen[name] = self._choice(entry, method.trials())
        return entry._replace(setting=entry.setting | self.chosen[name]["chosen"])

    def _choice(self, entry: Entry, trials: list[Setting]) -> dict[str, Any]:
        truth, known = self._tuning
        key = self._key(entry, 0, images=digest(_bytes(truth)), holes=digest(known.bool()), trials=json.dumps(trials))
        path = self.folder / "chosen" / f"{entry.method}-{key[:16]}.json"

        def tried() -> dict[str, Any]:
            distances = []
            for trial in tqdm(trials, desc=f"{entry.label}: settings", leave=False, disable=len(trials) < 4):
                images, _ = self._filled(entry._replace(setting=entry.setting | trial), truth, known, 0)
                distances.append(float(self.perceptual.hole(pasted(images, truth, known), truth, 1 - known).mean()))
            best = trials[min(range(len(trials)), key=distances.__getitem__)]
            scores = [trial | {CHOSEN_BY: distance} for trial, distance in zip(trials, distances)]
            return {"chosen": best, "with": entry.setting, "training images": len(truth), "trials": scores}

        return stored_json(path, tried)


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's shape and bytes."""
    array = tensor.contiguous().cpu().numpy()
    return hashlib.sha256(str((array.dtype, array.shape)).encode() + array.tobytes()).hexdigest()


def _images(run: Trained, rows: Rows, count: int) -> tuple[Tensor, Tensor]:
    """(the first images (n, C, H, W) in [−1, 1], their row numbers)."""
    few = rows.select(list(range(min(count, len(rows)))))
    batch = build_table(run.config, run.pipeline.model, few).all()
    (images,) = complete(batch, run.config.anchor)
    return images, batch.present[run.config.anchor].nonzero()[:, 0]


def _check_one_data_set(runs: Sequence[Trained]) -> None:
    def data_of(run: Trained) -> tuple[Any, ...]:
        config: Config = run.config
        data = config.data
        column, image = config.column(config.anchor), run.pipeline.model.modalities[config.anchor]
        return data.source, data.options, data.split, data.validation_split, data.holdout, column, image.value_shape

    names = [run.name for run in runs]
    for run in runs:
        if data_of(run) != data_of(runs[0]):
            remedy = f"has other data than {names[0]}; score runs of one data set, or give data.… of it as overrides"
            raise InputError("RUN", run.name, remedy)
        if names.count(run.name) > 1:
            raise InputError("RUN", run.name, "is the name of two runs; rename one folder")


def _bytes(images: Tensor) -> Tensor:
    """[−1, 1] -> 8 bits."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def _floats(images: Tensor, like: Tensor) -> Tensor:
    return images.to(like.dtype) / 127.5 - 1


def _save(cell: Cell, path: Path, key: str) -> None:
    tensors = {"fills": cell.fills} | {f"scores/{name}": values for name, values in cell.scores.items()}
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}  # some are the same
    save_file(
        tensors, path, metadata={"key": key, "seconds": repr(cell.seconds), "evaluations": repr(cell.evaluations)}
    )


def _read(path: Path, key: str) -> Cell:
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        if facts["key"] != key:
            raise InputError("--out", str(path), "holds another part than its name says; remove it")
        tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
        scores = {name.removeprefix("scores/"): values for name, values in tensors.items() if name != "fills"}
        return Cell(tensors["fills"], scores, float(facts["seconds"]), float(facts["evaluations"]))
