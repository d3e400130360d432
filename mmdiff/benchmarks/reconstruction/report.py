"""What masked reconstruction gave: rows with intervals, paired differences, one table, one JSON, one picture."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from mmdiff.benchmarks.reconstruction.benchmark import RAW, Benchmark, Result
from mmdiff.benchmarks.reconstruction.methods import Entry
from mmdiff.benchmarks.reconstruction.trained import Trained
from mmdiff.errors import InputError
from mmdiff.evaluation.report import circumstances
from mmdiff.evaluation.tables import facts, grouped, table
from mmdiff.metrics.bootstrap import interval, scored

ALL = "all"  # patterns together: means over them, image by image
PAIRED = ("LPIPS, hole", "PSNR, hole", "SSIM, hole")
PICTURED = 8  # rows of the picture, at least
SHOWN = {  # columns of the text: the rest stands in the JSON
    "LPIPS hole": "LPIPS, hole",
    "whole": "LPIPS, whole",
    "PSNR hole": "PSNR, hole",
    " whole": "PSNR, whole",
    "SSIM hole": "SSIM, hole",
    "  whole": "SSIM, whole",
    "not pasted: LPIPS hole": f"LPIPS, hole, {RAW}",
    "LPIPS whole": f"LPIPS, whole, {RAW}",
    "PSNR whole": f"PSNR, whole, {RAW}",
}
Group = list[Result]  # of one entry and ratio: one pattern's, or all patterns'


def tree(benchmark: Benchmark, results: Sequence[Result], reference: str | None = None) -> dict[str, Any]:
    """{"manifest", "rows", "differences"}, plain dicts and lists.

    Args:
        benchmark, results: what was asked, and `Benchmark.results`.
        reference: the label of the entry that all others are compared with; default: the first that draws given the
            masked image in channels by a model that also has a head, else the first of a run.

    Raises:
        InputError: for a reference that is no label.
    """
    chosen = _reference([result.entry for result in results], reference)
    groups = list(_groups(results))
    rows = [_row(pattern, group) for pattern, group in groups]
    return {
        "manifest": _manifest(benchmark, results) | {"compared with": chosen},
        "rows": rows,
        "differences": list(_differences(groups, chosen)),
    }


def text(tree: dict[str, Any], each_pattern: bool = True) -> str:
    """The tables of scores and of differences; long lines.

    Args:
        tree: of `tree`.
        each_pattern: whether a pattern has tables of its own where there are several.
    """
    rows, differences = tree["rows"], tree["differences"]
    if not each_pattern and any(row["pattern"] == ALL for row in rows):
        rows, differences = ([row for row in each if row["pattern"] == ALL] for each in (rows, differences))
    lines = facts(tree["manifest"])
    for (ratio, pattern), own in _by_place(rows):
        seeds = max(len(row["seeds"]) for row in own)
        title = f"holes {pattern}, {ratio:g} of the pixels, {own[0]['images']} images, {seeds} seed{'s' * (seeds > 1)}"
        lines += ["", f"{title}; ± half of the 95 % interval", ""]
        lines += table(["method", *SHOWN, "diversity", "s/image", "evaluations"], [_cells(row) for row in own])
    for (ratio, pattern), own in _by_place(differences):
        title = f"minus {tree['manifest']['compared with']}, image by image: holes {pattern}, {ratio:g}"
        cells = [[row["method"], *(_difference(row[name]) for name in PAIRED)] for row in own]
        lines += ["", title, "", *table(["method", *(f"{name}: difference" for name in PAIRED)], cells)]
    return "\n".join(lines)


def pictures(benchmark: Benchmark, results: Sequence[Result]) -> dict[str, list[PILImage.Image]]:
    """Columns by title: source, masked, and the pasted fill of each entry; a row shows one set of holes, and the rows
    show different images."""
    sets, truth = benchmark.holes, benchmark.truth
    image = benchmark.runs[0].pipeline.model.modalities[benchmark.config.anchor]
    by = {(result.entry.label, result.holes.pattern, result.holes.ratio): result.cells[0] for result in results}
    labels = list(dict.fromkeys(result.entry.label for result in results if result.entry.method != "masked"))
    rows = []
    for row in range(max(PICTURED, len(sets))):
        holes, index = sets[row * len(sets) // max(PICTURED, len(sets))], row % len(truth)
        known = holes.known[index]  # (1, H, W)
        fills = (by[label, holes.pattern, holes.ratio].fills[index].float() / 127.5 - 1 for label in labels)
        filled = [torch.where(known > 0, truth[index], fill) for fill in fills]
        rows.append(image.postprocess(torch.stack([truth[index], truth[index] * known, *filled])))
    return dict(zip(["source", "masked", *labels], map(list, zip(*rows, strict=True)), strict=True))


# --------------------------------------------------------------------------------------------------------------- rows


def _groups(results: Sequence[Result]) -> Iterable[tuple[str, Group]]:
    """(pattern, results) of every ratio and entry: each pattern, and where there are several all of them together."""
    for _, of_ratio in grouped(results, [(result.holes.ratio,) for result in results]):
        by_pattern = [own for _, own in grouped(of_ratio, [(result.holes.pattern,) for result in of_ratio])]
        if len(by_pattern) > 1:
            yield from ((ALL, list(group)) for group in zip(*by_pattern, strict=True))
        for own in by_pattern:
            yield from ((result.holes.pattern, [result]) for result in own)


def _scores(group: Group, name: str) -> np.ndarray:
    """(seeds, n): means over patterns."""
    cells = [[cell.scores[name].double().numpy() for cell in result.cells] for result in group]
    return np.asarray(cells).mean(axis=0)


def _row(pattern: str, group: Group) -> dict[str, Any]:
    entry, cells = group[0].entry, [cell for result in group for cell in result.cells]
    scores: dict[str, Any] = {}
    for name in cells[0].scores:
        values = _scores(group, name)  # (seeds, n)
        scores |= scored(name, values.mean(axis=0))
        scores[f"{name}, by seed"] = values.mean(axis=1).tolist()
    return {
        **_place(pattern, group),
        "run": entry.run.name if entry.run else None,
        "by": entry.method,
        "setting": entry.setting,
        "images": len(cells[0].fills),
        "seeds": list(range(len(group[0].cells))),
        "hidden share": float(np.mean([1 - result.holes.known.mean() for result in group])),
        **scores,
        "diversity": _mean_or_none([diversity(result) for result in group]),
        "seconds per image": float(np.mean([cell.seconds for cell in cells])),
        "evaluations per image": float(np.mean([cell.evaluations for cell in cells])),
    }


def _place(pattern: str, group: Group) -> dict[str, Any]:
    return {"method": group[0].entry.label, "pattern": pattern, "ratio": group[0].holes.ratio}


def diversity(result: Result) -> float | None:
    """Mean squared difference on the hole, in [−1, 1], of pairs of seeds, averaged over pairs and images."""
    pairs = list(itertools.combinations([cell.fills.float() / 127.5 for cell in result.cells], 2))
    if not pairs:
        return None
    hole = 1 - result.holes.known  # (n, 1, H, W)
    return float(np.mean([_mean_on((one - other) ** 2, hole) for one, other in pairs]))


def _mean_on(values: Tensor, mask: Tensor) -> float:
    """(n, C, H, W): means over channels and the pixels that count, then over images."""
    per_image = (values.mean(dim=1, keepdim=True) * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
    return float(per_image.mean())


def _mean_or_none(values: list[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def _differences(groups: list[tuple[str, Group]], reference: str) -> Iterable[dict[str, Any]]:
    """Every entry minus the reference, image by image, with a bootstrap interval of the mean over images."""
    of_reference = {
        (pattern, group[0].holes.ratio): group for pattern, group in groups if group[0].entry.label == reference
    }
    for pattern, group in groups:
        if group[0].entry.label != reference:
            base, row = of_reference[pattern, group[0].holes.ratio], _place(pattern, group)
            for name in PAIRED:
                values = _scores(group, name).mean(axis=0) - _scores(base, name).mean(axis=0)  # (n,)
                row[name] = {"mean": float(values.mean()), "95 %": list(interval(values))}
            yield row


def _reference(entries: list[Entry], asked: str | None) -> str:
    labels = list(dict.fromkeys(entry.label for entry in entries))
    if asked is not None:
        if asked not in labels:
            raise InputError("--reference", asked, f"choose one of {'; '.join(labels)}")
        return asked
    own = [entry.label for entry in entries if entry.run and entry.run.has_head and entry.method == "concatenation"]
    return (own or [entry.label for entry in entries if entry.run] or labels)[0]


# ----------------------------------------------------------------------------------------------------------- manifest


def _manifest(benchmark: Benchmark, results: Sequence[Result]) -> dict[str, Any]:
    """What a reader needs to believe a number, and to make it again."""
    seconds = sum(cell.seconds * len(cell.fills) for result in results for cell in result.cells)
    return circumstances(benchmark.device) | {
        "data": benchmark.config.data.source,
        "images": f"the first {len(benchmark.truth)} held-out rows, sha256 {benchmark.images_digest}",
        "holes": {f"{holes.pattern} {holes.ratio:g}": holes.facts() for holes in benchmark.holes},
        "sampling seeds": list(benchmark.seeds),
        **benchmark.perceptual.facts(),
        "LPIPS on the hole": "the spatial map, upsampled to the (enlarged) image, averaged over the hole's pixels",
        "SSIM on the hole": "the map's mean over the hole's pixels",
        "paste-back": "known pixels of every method's 8-bit output are replaced by the truth's, the same way for all",
        "intervals": "95 % bootstrap over images (percentiles, 2000 draws) of means over seeds and patterns",
        "diversity": "mean squared difference on the hole, in [-1, 1], between pairs of seeds",
        "evaluations": "of the backbone per image, counted; guidance's branches count",
        "chosen on training images": benchmark.chosen,
        "runs": {run.name: _trained(run) for run in benchmark.runs},
        "sampling hours": round(seconds / 3600, 4),
    }


def _trained(run: Trained) -> dict[str, Any]:
    train, sweep = run.config.train, run.folder / "sweep.json"
    return {
        "pipeline sha256": run.digest,
        "parameters": sum(parameter.numel() for parameter in run.pipeline.model.parameters()),
        "steps": train.steps,
        "samples seen": train.steps * train.batch_size,
        "optimizer": train.optimizer,
        "learning rate": train.learning_rate,
        "EMA": train.ema_decay,
        "training seconds": _training_seconds(run.folder / "metrics.jsonl", train.batch_size),
        "solver": run.pipeline.scheduler.config.solver,
        "sweep": json.loads(sweep.read_text()) if sweep.is_file() else None,
    }


def _training_seconds(path: Path, batch_size: int) -> float | None:
    """From the images per second of metrics.jsonl."""
    if not path.is_file():
        return None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = np.diff([0, *(line["step"] for line in lines)])
    return round(float(sum(s * batch_size / line["images_per_second"] for s, line in zip(steps, lines))), 1)


# --------------------------------------------------------------------------------------------------------------- text


def _by_place(rows: list[dict[str, Any]]) -> Iterable[tuple[tuple, list[dict[str, Any]]]]:
    return grouped(rows, [(row["ratio"], row["pattern"]) for row in rows])


def _cells(row: dict[str, Any]) -> list[str]:
    first, *rest = SHOWN.values()
    low, high = row[f"{first}, 95 %"]
    seeds = row[f"{first}, by seed"]
    spread = f" (seeds {min(seeds):.3f}…{max(seeds):.3f})" if len(seeds) > 1 else ""
    cells = [row["method"], f"{row[first]:.3f} [{low:.3f}, {high:.3f}]{spread}"]
    for name in rest:
        low, high = row[f"{name}, 95 %"]
        digits = 2 if name.startswith("PSNR") else 3
        cells.append(f"{row[name]:.{digits}f} ±{(high - low) / 2:.{digits}f}")
    diverse = row["diversity"]
    return [
        *cells,
        "–" if diverse is None else f"{diverse:.4f}",
        f"{row['seconds per image']:.3f}",
        f"{row['evaluations per image']:g}",
    ]


def _difference(score: dict[str, Any]) -> str:
    low, high = score["95 %"]
    return f"{score['mean']:+.4f} [{low:+.4f}, {high:+.4f}]"
