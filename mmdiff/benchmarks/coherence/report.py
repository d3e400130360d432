"""The coherence benchmark's results as text and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor, nn

from mmdiff.benchmarks.coherence.scores import Images
from mmdiff.evaluation.tables import facts, grouped, table
from mmdiff.plots import scores_by_size

SHOWN, _ENLARGED = 12, 3  # rows of data in a picture


def text(tree: dict[str, Any]) -> str:
    """A table per missing rate."""
    lines = facts(tree["manifest"])
    for (share,), rows in grouped(tree["rows"], [(row["missing"],) for row in tree["rows"]]):
        sizes, names = list(rows[0]["conditional"]), list(rows[0]["distance"])
        head = [
            "coherence",
            "joint",
            *(f"given {size}" for size in sizes),
            "steps",
            "CPU s",
            "million",
            "learning rate",
        ]
        lines += ["", f"{share:.0%} missing: joint coherence, and conditional by how many images are given", ""]
        lines += table(head, [_coherence(row) for row in rows])
        head = ["", *(f"label, given {size}" for size in sizes), *(f"Fréchet, {name}" for name in names)]
        lines += ["", f"{share:.0%} missing: label accuracy, and Fréchet distance ({rows[0]['features']})", ""]
        lines += table(head, [_labels_and_distances(row) for row in rows])
        real = ", ".join(f"{name} {_score(row)}" for name, row in rows[0]["distance, real against real"].items())
        lines += ["", f"Fréchet distance of real against real rows: {real}"]
    return "\n".join(lines)


def _coherence(row: dict[str, Any]) -> list[str]:
    cost = f"{row['steps']:.0f}", f"{row['CPU seconds']:.0f}", f"{row['parameters'] / 1e6:.2f}"
    scores = [row["joint"], *row["conditional"].values()]
    return [_name(row), *(_score(score) for score in scores), *cost, f"{row['learning rate']:g}"]


def _labels_and_distances(row: dict[str, Any]) -> list[str]:
    scores = [*row["label accuracy"].values(), *row["distance"].values()]
    return [_name(row), *(_score(score) for score in scores)]


def _name(row: dict[str, Any]) -> str:
    return row["side"] + (f" ({row['diverged']} diverged)" if row["diverged"] else "")


def _score(score: dict[str, Any]) -> str:
    between = "" if score["95 %"] is None else f" [{score['95 %'][0]:.3f}, {score['95 %'][1]:.3f}]"
    return f"{score['mean']:.3f}{between}"


def curves(rows: list[dict[str, Any]], path: Path) -> Path:
    """Coherence over the size of the given subset, a panel per missing rate; nothing given is joint coherence."""
    panels = {
        f"{share:.0%} missing": {row["side"]: {0: row["joint"], **row["conditional"]} for row in own}
        for (share,), own in grouped(rows, [(row["missing"],) for row in rows])
    }
    return scores_by_size(panels, "images given", "coherence", path)


def gallery(joint: Images, conditional: Images, names: list[str], path: Path) -> None:
    """Above joint samples, below what is made from the first modality; a column is a row of data."""
    height, width = (max(joint[name].shape[side] for name in names) for side in (2, 3))
    blocks = [
        torch.cat([_row(nn.functional.interpolate(images[name][:SHOWN], (height, width))) for name in names], dim=1)
        for images in (joint, conditional)
    ]
    gap = torch.ones(3, 2, blocks[0].shape[2])
    pixels = torch.cat([blocks[0], gap, blocks[1]], dim=1)  # (3, height, width) in [−1, 1]
    picture = PILImage.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (_ENLARGED * picture.width, _ENLARGED * picture.height)
    picture.resize(size, PILImage.Resampling.NEAREST).save(path)


def _row(images: Tensor) -> Tensor:
    """Images side by side, (3, H, n · W)."""
    return torch.cat(list(images.clamp(-1, 1).expand(-1, 3, -1, -1)), dim=2)
