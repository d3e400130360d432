"""Plots of a run: sample grids, the forward process, weight schedules, curves."""

from __future__ import annotations

import json
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from mmdiff.config import SampleConfig
from mmdiff.grids import class_names, grid, sample_grid
from mmdiff.modalities.fusion import FUSIONS
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.sampling.conditioning import aggregated_names, peak_weights
from mmdiff.schedulers import MTScheduler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 10
SMALL = 0.01  # a term of the loss that never exceeds it gets no panel
TERMS = ("loss", "l0", "l1", "l3", "contrastive", "repa")
FAMILIES = {  # {beginning of a name: title of the panel that all such names share}
    "weight/": "learned weights",
    "norm/": "norms of gradients",
    "cosine/": "cosines of gradients",
    "images_per_second": "images per second",
}


def save_grid(
    pipeline: MTDiffusionPipeline, path: Path, sample: SampleConfig, seed: int = 0, columns: int = COLUMNS
) -> Path:
    """A grid of samples: a row per value of the first condition of training with a gallery, else joint samples."""
    model = pipeline.model
    generator = torch.Generator().manual_seed(seed)
    trained = model.observable | aggregated_names(None, peak_weights(pipeline.scheduler))
    galleries = {name: model.modalities[name].gallery() for name in model.auxiliary if name in trained}
    name = next((name for name, gallery in galleries.items() if gallery is not None), None)
    arguments = {"num_inference_steps": sample.steps, "feedback": sample.feedback, "generator": generator}
    arguments |= sample.phases()
    if name is None:
        output, titles = pipeline(batch_size=columns**2, **arguments), []
    else:
        rows = galleries[name].repeat_interleave(columns, dim=0)
        scales = sample.scales({name} & set(model.observable))
        output = pipeline(observed={name: rows}, guidance_scale=scales, **arguments)
        titles = class_names(model.modalities[name], model.modalities[name].postprocess(galleries[name]))
    path.parent.mkdir(parents=True, exist_ok=True)
    sample_grid(model, output.samples, columns, titles).save(path)
    return path


def set_weights(sets: list[list[Image.Image]], weights: torch.Tensor, path: Path) -> Path:
    """One row per set of images: every image with its weight as a number and as the thickness of its frame.

    Args:
        sets: images of B sets, any sizes.
        weights: (B, n), of the images in their order.
        path: of the PNG.
    """
    columns = max(map(len, sets))
    figure = _figure(1.3 * columns, 1.5 * len(sets))
    axes = figure.subplots(len(sets), columns, squeeze=False)
    for row, images, shares in zip(axes, sets, weights.tolist(), strict=True):
        for axis in row[len(images) :]:
            axis.set_axis_off()
        for axis, image, share in zip(row, images, shares, strict=False):
            axis.imshow(image.convert("RGB"))
            axis.set(title=f"{share:.2f}", xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set(linewidth=0.5 + 5 * share, color="tab:orange")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def weight_schedules(scheduler: MTScheduler, path: Path) -> Path:
    """s_t (√ā_t, or 1 − σ), and W_t and w_t of every modality."""
    weights = sorted(scheduler.config.weights or {})
    figure = _figure(9.0 if weights else 4.5, 3.2)
    axes = figure.subplots(1, 2 if weights else 1, squeeze=False)[0]
    t = np.arange(1, len(scheduler) + 1)
    axes[0].plot(t, scheduler.path.signal, "k--", label="s_t (anchor)")
    for name in weights:
        axes[0].plot(t, scheduler.cumulative_weights(name).detach(), label=f"W_t {name}")
        axes[1].plot(t, scheduler.step_weights(name).detach(), label=f"w_t {name}")
    titles = ("weights in the marginal, Eq. (2)", "weights in a transition, Eq. (1)")
    for axis, title in zip(axes, titles, strict=False):
        axis.axhline(0.0, color="0.8", linewidth=0.8)  # so that a constant is drawn as one
        axis.set(xlabel="t", title=title)
        axis.legend()
    figure.savefig(path, dpi=110)
    return path


def curves(metrics: Path, path: Path) -> Path:
    """The lines of metrics.jsonl over steps: a panel per term of the loss, and one per family of `FAMILIES`.

    Terms near 0 are named instead.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    series = {name: _series(lines, name) for name in dict.fromkeys(name for line in lines for name in line)}
    terms = [name for name in series if name in TERMS or name.startswith("l2/")]
    large = {name for name in terms if np.abs(series[name][1]).max(initial=0.0) > SMALL}
    panels = {name: {name: series[name]} for name in terms if name == "loss" or name in large}
    for prefix, title in FAMILIES.items():
        members = {name.removeprefix(prefix): series[name] for name in series if name.startswith(prefix)}
        panels |= {title: members} if members else {}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(3.2 * columns + 0.4, 2.2 * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, members) in zip(axes, panels.items(), strict=False):
        _panel(axis, title, members)
    for axis in axes[len(panels) :]:
        axis.remove()
    small = [name for name in terms if name not in panels]
    figure.suptitle("terms of the loss" + (f" (below {SMALL}: {', '.join(small)})" if small else ""), fontsize="medium")
    figure.savefig(path, dpi=110)
    return path


def _series(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have a finite value of this name."""
    points = np.array([(line["step"], line[name]) for line in lines if name in line], dtype=float)
    return points[np.isfinite(points[:, 1])].T


def _panel(axis: Any, title: str, members: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    for name, (steps, values) in members.items():
        axis.plot(steps, values, marker="." if len(steps) == 1 else None, label=name)
    axis.set(title=title, xlabel="step")
    values = np.concatenate([values for _, values in members.values()])
    if len(values) and values.min() > 0 and values.max() > 30 * values.min():
        axis.set_yscale("log")
    if list(members) != [title] and list(members) != [""]:
        axis.legend(fontsize="xx-small", loc="best")


def forward_process(
    scheduler: MTScheduler,
    z_0: torch.Tensor,
    encodings: dict[str, torch.Tensor],
    columns: int = 9,
    seed: int = 0,
) -> Image.Image:
    """z_t of Eq. (2) for a few samples (rows) over time (columns), with its time above each column."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(z_0.shape, generator=generator)
    steps = torch.linspace(scheduler.first_timestep, scheduler.terminal_timestep, columns).round().long()
    rows = []
    for i in range(len(z_0)):
        one = {name: encoding[i : i + 1] for name, encoding in encodings.items()}
        z = [scheduler.add_noise(z_0[i : i + 1], noise[i : i + 1], t[None], one)[0] for t in steps]
        rows.append([_as_image(z_t) for z_t in z])
    return grid(rows, [f"t={t - scheduler.first_timestep + 1}" for t in steps.tolist()])


def _as_image(z_t: torch.Tensor) -> Image.Image:
    """(C, H, W) in −2 … 2 as grey or RGB."""
    pixels = ((z_t.clamp(-2, 2) + 2) * 63.75).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def accuracy_by_photos(rows: list[dict[str, Any]], path: Path) -> Path:
    """Accuracy over the number of photos, of rows of `mmdiff.benchmarks.fusion.run`: one panel per task and share
    of distractors, bars are 95 % intervals between seeds. Fusions are in colour."""
    single = [row for row in rows if "all" not in (row["photos"], row["distractors"])]
    panels: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    for row in single:
        panel = panels.setdefault((row["task"], row["distractors"]), {})
        panel.setdefault(row["entry"], []).append(row)
    tasks, shares = (list(dict.fromkeys(key[index] for key in panels)) for index in (0, 1))
    entries = list(dict.fromkeys(row["entry"] for row in single))
    figure = _figure(3.2 * len(shares) + 2.8, max(2.9 * len(tasks), 4.2))
    axes = figure.subplots(len(tasks), len(shares), squeeze=False, sharey=True)
    others = cycle(product(("--", ":", "-."), ("black", "grey", "silver")))
    styles = {entry: {} if entry in FUSIONS else dict(zip(("linestyle", "color"), next(others))) for entry in entries}
    for (task, share), lines in panels.items():
        axis = axes[tasks.index(task)][shares.index(share)]
        for index, (entry, points) in enumerate(lines.items()):
            scores = [point["accuracy"] for point in points]
            halves = [0.0 if one["95 %"] is None else one["95 %"][1] - one["mean"] for one in scores]
            beside = 0.03 * (index - (len(lines) - 1) / 2)  # entries that agree would hide each other
            photos, means = [point["photos"] + beside for point in points], [one["mean"] for one in scores]
            axis.errorbar(photos, means, yerr=halves, label=entry, linewidth=1.2, elinewidth=0.6, **styles[entry])
        axis.set(title=f"{task}, {share:.0%} distractors", xlabel="photos", ylabel="accuracy", ylim=(-0.03, 1.03))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    return path


def scores_by_size(
    panels: dict[str, dict[str, dict[int, dict[str, Any]]]], xlabel: str, ylabel: str, path: Path
) -> Path:
    """{panel: {line: {x: {"mean", "95 %"}}}} as lines, bars being 95 % intervals between seeds."""
    figure = _figure(3.2 * len(panels) + 1.6, 3.4)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, lines) in zip(axes, panels.items()):
        for name, points in lines.items():
            halves = [0.0 if one["95 %"] is None else one["95 %"][1] - one["mean"] for one in points.values()]
            axis.errorbar(list(points), [one["mean"] for one in points.values()], yerr=halves, label=name, marker=".")
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(-0.03, 1.03))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    return path


def _figure(width: float, height: float) -> Figure:
    """A figure without pyplot, whose choice of a window system belongs to the person."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
