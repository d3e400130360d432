"""Pictures: sample grids, the forward process, weight schedules, curves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from mmdiff.config import SampleConfig
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.schedulers import MTScheduler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 10


def side_by_side(rows: list[list[Image.Image]], path: Path) -> Path:
    """One row per sample, one column per way to see it; images of any mode and of one size per column."""
    coloured = [image.convert("RGB") for row in rows for image in row]
    path.parent.mkdir(parents=True, exist_ok=True)
    tile(coloured, len(rows[0]), zoom=max(1, 96 // coloured[0].height)).save(path)
    return path


def titled(titles: list[str], rows: list[list[Image.Image]], path: Path) -> Path:
    """Columns with titles, written upwards; images of one size."""
    from matplotlib.font_manager import findfont
    from PIL import ImageDraw, ImageFont

    grid = tile(
        [image.convert("RGB") for row in rows for image in row], len(titles), zoom=max(1, 64 // rows[0][0].height)
    )
    font = ImageFont.truetype(findfont("DejaVu Sans"), 12)
    step, height = grid.width // len(titles), 8 + max(int(font.getlength(title)) for title in titles)
    strip = Image.new("RGB", (height, grid.width), "white")  # turned by 90°
    draw = ImageDraw.Draw(strip)
    for index, title in enumerate(titles):
        draw.text((4, (index + 0.5) * step), title, fill="black", font=font, anchor="lm")
    canvas = Image.new("RGB", (grid.width, grid.height + height), "white")
    canvas.paste(strip.rotate(90, expand=True), (0, 0))
    canvas.paste(grid, (0, height))
    canvas.save(path)
    return path


def tile(images: list[Image.Image], columns: int, gap: int = 2, zoom: int = 1) -> Image.Image:
    """Images of one size in rows of ``columns``, with a gap so that they do not run into each other."""
    width, height = images[0].width * zoom, images[0].height * zoom
    rows = -(-len(images) // columns)
    grey = images[0].mode == "L"
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap)
    canvas = Image.new("L" if grey else "RGB", size, 128 if grey else (128,) * 3)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        tile_ = image.resize((width, height), Image.Resampling.NEAREST)
        if tile_.mode in ("LA", "RGBA"):  # what is transparent shows the ground
            tile_ = Image.alpha_composite(Image.new("RGBA", tile_.size, (128,) * 3 + (255,)), tile_.convert("RGBA"))
        canvas.paste(tile_, (gap + column * (width + gap), gap + row * (height + gap)))
    return canvas


def save_grid(
    pipeline: MTDiffusionPipeline, path: Path, sample: SampleConfig, seed: int = 0, columns: int = COLUMNS
) -> Path:
    """A grid of anchors: one row per value of the first modality that has a gallery, else joint samples."""
    model = pipeline.model
    generator = torch.Generator().manual_seed(seed)
    galleries = {name: model.modalities[name].gallery() for name in model.auxiliary}
    name = next((name for name, gallery in galleries.items() if gallery is not None), None)
    arguments = {"num_inference_steps": sample.steps, "feedback": sample.feedback, "generator": generator}
    if name is None:
        output = pipeline(batch_size=columns**2, **arguments)
    else:
        rows = galleries[name].repeat_interleave(columns, dim=0)
        scales = sample.scales({name} & set(model.observable))
        output = pipeline(observed={name: rows}, guidance_scale=scales, **arguments)
    images = output.samples[model.anchor]
    path.parent.mkdir(parents=True, exist_ok=True)
    tile(images, columns, zoom=max(1, 48 // images[0].height)).save(path)
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
    figure = _figure(9.0, 3.2)
    left, right = figure.subplots(1, 2)
    t = np.arange(1, len(scheduler) + 1)
    left.plot(t, scheduler.path.signal, "k--", label="s_t (anchor)")
    for name in sorted(scheduler.config.weights or {}):
        left.plot(t, scheduler.cumulative_weights(name).detach(), label=f"W_t {name}")
        right.plot(t, scheduler.step_weights(name).detach(), label=f"w_t {name}")
    for axis, title in ((left, "weights in the marginal, Eq. (2)"), (right, "weights in a transition, Eq. (1)")):
        axis.axhline(0.0, color="0.8", linewidth=0.8)  # so that a constant is drawn as one
        axis.set(xlabel="t", title=title)
        if axis.get_legend_handles_labels()[1]:
            axis.legend()
    figure.savefig(path, dpi=110)
    return path


def curves(metrics: Path, path: Path) -> Path:
    """The terms of metrics.jsonl over steps."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    names = [n for n in lines[0] if n == "loss" or n.startswith("l")]
    names = [n for n in names if n != "learning_rate"]
    figure = _figure(7.0, 3.2)
    axis = figure.subplots()
    for name in names:
        axis.plot([line["step"] for line in lines], [line.get(name, math.nan) for line in lines], label=name)
    if min(line.get(name, 0.0) for line in lines for name in names) > -0.1:
        axis.set_yscale("symlog", linthresh=0.01)  # errors fall over decades; densities below 0 do not
    axis.set(xlabel="step", title="terms of the loss")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")  # beside the curves, not on them
    figure.savefig(path, dpi=110)
    return path


def forward_process(
    scheduler: MTScheduler,
    z_0: torch.Tensor,
    encodings: dict[str, torch.Tensor],
    columns: int = 9,
    seed: int = 0,
) -> Image.Image:
    """z_t of Eq. (2) for a few samples (rows) over time (columns), as grey or RGB tiles."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(z_0.shape, generator=generator)
    steps = torch.linspace(scheduler.first_timestep, scheduler.terminal_timestep, columns).round().long()
    tiles = []
    for i in range(len(z_0)):
        for t in steps:
            one = {name: e[i : i + 1] for name, e in encodings.items()}
            z = scheduler.add_noise(z_0[i : i + 1], noise[i : i + 1], t[None], one)
            pixels = ((z[0].clamp(-2, 2) + 2) * 63.75).round().byte().permute(1, 2, 0).numpy()
            tiles.append(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
    return tile(tiles, columns, zoom=max(1, 48 // tiles[0].height))


def accuracy_by_photos(rows: list[dict[str, Any]], path: Path) -> Path:
    """Accuracy over the number of photos, of rows of `mmdiff.benchmarks.fusion.run`: one panel per task and share
    of distractors, bars are 95 % intervals between seeds."""
    single = [row for row in rows if "all" not in (row["photos"], row["distractors"])]
    panels: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    for row in single:
        panel = panels.setdefault((row["task"], row["distractors"]), {})
        panel.setdefault(row["entry"], []).append(row)
    tasks, shares = (list(dict.fromkeys(key[index] for key in panels)) for index in (0, 1))
    figure = _figure(3.2 * len(shares) + 2.2, 2.9 * len(tasks))
    axes = figure.subplots(len(tasks), len(shares), squeeze=False, sharey=True)
    for (task, share), lines in panels.items():
        axis = axes[tasks.index(task)][shares.index(share)]
        for index, (entry, points) in enumerate(lines.items()):
            found = [point["accuracy"] for point in points]
            halves = [0.0 if one["95 %"] is None else one["95 %"][1] - one["mean"] for one in found]
            beside = 0.05 * (index - (len(lines) - 1) / 2)  # entries that agree would hide each other
            photos, means = [point["photos"] + beside for point in points], [one["mean"] for one in found]
            axis.errorbar(photos, means, yerr=halves, label=entry, capsize=2, linewidth=1)
        axis.set(title=f"{task}, {share:.0%} distractors", xlabel="photos", ylabel="accuracy", ylim=(-0.03, 1.03))
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
    figure.savefig(path, dpi=110)
    return path


def _figure(width: float, height: float) -> Figure:
    """A figure without pyplot, whose choice of a window system belongs to the person."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
