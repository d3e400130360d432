"""What an evaluation leaves: rows of scores, a manifest that says how they came about, a table and a file."""

from __future__ import annotations

import itertools
import json
import platform
import sys
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage

from mmdiff.config import Config
from mmdiff.data import Table
from mmdiff.pipeline import MTDiffusionPipeline


@dataclass
class Row:
    """One line of the table: ``direction`` ("joint", "label → image", …), ``of`` whose values are scored, ``setting``
    (aggregate, steps, seed …) and the scores by name."""

    direction: str
    of: str
    setting: dict[str, Any]
    scores: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evaluation:
    """What `evaluate` returns and `evaluation.json` holds; ``pictures`` {name: rows of images side by side}."""

    manifest: dict[str, Any]
    rows: list[Row]
    pictures: dict[str, list[list[PILImage.Image]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return {"manifest": self.manifest, "rows": [vars(row) for row in self.rows]}


def manifest(pipeline: MTDiffusionPipeline, config: Config, train: Table, validation: Table) -> dict[str, Any]:
    """What a reader needs to believe a number, and to make it again."""
    return circumstances(pipeline.device) | {
        "data": config.data.source,
        "training rows": len(train),
        "held-out rows": len(validation),
        "real rows used": config.evaluate.max_rows,
        "samples": config.evaluate.num_samples,
        "seeds": config.evaluate.seeds,
        "solver": pipeline.scheduler.config.solver,
        "guidance_scale": config.sample.guidance_scale,
        "guidance": config.sample.guidance,
    }


def circumstances(device: torch.device) -> dict[str, Any]:
    """When, by which command and on what machine."""
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["mmdiff", *sys.argv[1:]]),
        "machine": f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads, {device}",
        "torch": torch.__version__,
    }


def table(evaluation: Evaluation) -> str:
    """The evaluation as text, seeds averaged."""
    groups: dict[tuple, list[Row]] = {}
    for row in evaluation.rows:
        key = (row.direction, row.of, *(f"{k}={v}" for k, v in row.setting.items() if k != "seed"))
        groups.setdefault(key, []).append(row)
    lines = [f"{k}: {v}" for k, v in evaluation.manifest.items()]
    for (direction, of, *setting), rows in groups.items():
        lines.append(f"\n{direction}: {of}  ({', '.join([*setting, f'{len(rows)} seed' + 's' * (len(rows) > 1)])})")
        for name in rows[0].scores:
            if not name.endswith(", 95 %"):
                between = _interval([row.scores.get(f"{name}, 95 %") for row in rows])
                lines.append(f"  {name:<24}{_cell([row.scores[name] for row in rows])}{between}")
    return "\n".join(lines)


def save(evaluation: Evaluation, path: Path) -> None:
    """Write evaluation.json; an earlier one is kept under a number."""
    make_room(path)
    path.write_text(json.dumps(evaluation.to_json(), indent=1, ensure_ascii=False) + "\n")


def make_room(path: Path) -> None:
    """A file that stands there is kept under a number."""
    if path.exists():
        numbers = (path.with_stem(f"{path.stem}-{k}") for k in itertools.count(1))
        path.rename(next(candidate for candidate in numbers if not candidate.exists()))


def _interval(values: list[Any]) -> str:
    """Mean ends of the seeds' intervals."""
    if values[0] is None:
        return ""
    low, high = np.mean(values, axis=0)
    return f"  [{low:.3f}, {high:.3f}]"


def _cell(values: list[Any]) -> str:
    mean = np.mean(np.asarray(values, dtype=np.float64), axis=0)
    if mean.ndim:
        return " ".join(f"{v:.3f}" for v in mean)
    spread = f"  (seeds {min(values):.3f} … {max(values):.3f})" if len(values) > 1 else ""
    return f"{mean:.3f}{spread}"
