"""What an evaluation leaves: rows of scores, a manifest that says how they came about, a table and a file."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdiff.config import Config
from mmdiff.data import Table
from mmdiff.errors import InputError
from mmdiff.evaluation import tables
from mmdiff.evaluation.tables import facts, grouped
from mmdiff.pipeline import MTDiffusionPipeline

_BROKEN = "is no whole evaluation and stays as it is; move it away"


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
    """What `evaluate` returns and `evaluation.json` holds; ``pictures`` {name: {title of a column: samples}}."""

    manifest: dict[str, Any]
    rows: list[Row]
    pictures: dict[str, dict[str, list[Any]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return {"manifest": self.manifest, "rows": [vars(row) for row in self.rows]}


def manifest(pipeline: MTDiffusionPipeline, config: Config, train: Table, validation: Table) -> dict[str, Any]:
    """What a reader needs to believe a number, and to make it again."""
    skipped = {"training": len(train.unusable.lines), "held out": len(validation.unusable.lines)}
    return circumstances(pipeline.device) | {
        "data": config.data.source,
        "training rows": len(train),
        "held-out rows": len(validation),
        **({"skipped values": skipped} if config.data.on_error == "skip" else {}),
        "samples": config.evaluate.num_samples,
        "seeds": config.evaluate.seeds,
        "solver": pipeline.scheduler.config.solver,
        "guidance_scale": config.sample.guidance_scale,
        "guidance": config.sample.guidance,
    }


def command() -> str:
    """What was called, as a shell reads it."""
    return shlex.join(["mmdiff", *sys.argv[1:]])


def circumstances(device: torch.device) -> dict[str, Any]:
    """When, by which command and on what machine."""
    return {
        "date": date.today().isoformat(),
        "command": command(),
        "machine": f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads, {device}",
        "torch": torch.__version__,
    }


def table(evaluation: Evaluation) -> str:
    """The evaluation as text, seeds averaged."""
    keys = [
        (row.direction, row.of, *(f"{k}={v}" for k, v in row.setting.items() if k != "seed")) for row in evaluation.rows
    ]
    lines = facts(evaluation.manifest)
    for (direction, of, *setting), rows in grouped(evaluation.rows, keys):
        lines += ["", f"{direction}: {of}  ({', '.join([*setting, f'{len(rows)} seed' + 's' * (len(rows) > 1)])})", ""]
        cells = [
            [
                name,
                _cell([row.scores[name] for row in rows]),
                _interval([row.scores.get(f"{name}, 95 %") for row in rows]),
            ]
            for name in rows[0].scores
            if not name.endswith(", 95 %")
        ]
        lines += tables.table(["score", "mean", "95 %"], cells)
    return "\n".join(lines)


def save(evaluation: Evaluation, path: Path) -> None:
    """Write evaluation.json; results of other settings that stand there are kept in it under "earlier".

    Raises:
        InputError: what stands there cannot be read; it is left as it is.
    """
    kept = read(path)
    earlier = kept.pop("earlier", {}) | ({_key(kept): kept} if kept else {})
    now = evaluation.to_json()
    earlier.pop(_key(now), None)
    text = json.dumps(now | {"earlier": earlier}, indent=1, ensure_ascii=False) + "\n"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        written = Path(folder) / path.name
        written.write_text(text, encoding="utf-8")
        written.replace(path)


def read(path: Path) -> dict[str, Any]:
    """An evaluation.json; {} where there is none.

    Raises:
        InputError: it cannot be read.
    """
    if not path.exists():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError("evaluation.json", str(path), f"{_BROKEN} ({error})") from None
    whole = isinstance(tree, dict) and isinstance(tree.get("manifest"), dict) and isinstance(tree.get("rows"), list)
    if not whole or not isinstance(tree.get("earlier", {}), dict):
        raise InputError("evaluation.json", str(path), f"{_BROKEN} (no manifest and rows)")
    return tree


def settings_hash(config: Config, *asked: Any) -> str:
    """Twelve digits that stand for a config and for what an evaluation was asked: for equal ones the same."""
    kept = config.model_dump(mode="json", exclude={"output": True, "track": True, "train": {"resume", "threads"}})
    return _digits(kept, asked)


def _digits(*things: Any) -> str:
    return hashlib.sha256(json.dumps(things, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _key(result: dict[str, Any]) -> str:
    """The hash of a result's settings; of the result itself where it is older than these hashes."""
    return result["manifest"].get("settings") or _digits(result["manifest"], result["rows"])


def _interval(values: list[Any]) -> str:
    """Mean ends of the seeds' intervals."""
    if values[0] is None:
        return ""
    low, high = np.mean(values, axis=0)
    return f"[{low:.3f}, {high:.3f}]"


def _cell(values: list[Any]) -> str:
    if values and isinstance(values[0], dict):  # a score by name; one without a value counts nothing
        known = {name: [row[name] for row in values if row[name] is not None] for name in values[0]}
        return ", ".join(f"{name} {_cell(scores)}" for name, scores in known.items())
    if not values:
        return "–"
    mean = np.mean(np.asarray(values, dtype=np.float64), axis=0)
    if mean.ndim:
        return " ".join(f"{v:.3f}" for v in mean)
    spread = f"  (seeds {min(values):.3f} … {max(values):.3f})" if len(values) > 1 else ""
    return f"{mean:.3f}{spread}"
