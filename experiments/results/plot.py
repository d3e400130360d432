"""Draws the pictures of the pages here from their JSON files: `python experiments/results/plot.py [FOLDER]`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).parent
NUMBER = r"[-+]?\d+(?:\.\d+)?"
INTERVAL = re.compile(rf"({NUMBER})(?: [(\[]({NUMBER})(?:–|, )({NUMBER})[)\]])?")
RECONSTRUCTIONS = {
    "Navier–Stokes": "navier-stokes",
    "(c) RePaint, 50 evaluations": "(c) unconditional: repaint, 50 evaluations",
    "(d) SDEdit, 50 evaluations": "(d) unconditional: sdedit, 50 evaluations",
    "(b) reconstruction alone": "(b) reconstruction alone: head",
    "(a) multi-task, {steps} evaluations": "(a) multi-task: concatenation+replacement (steps {steps})",
    "(e) conditional, {steps} evaluations": "(e) conditional: concatenation+replacement (steps {steps})",
}
COLOURS = {
    "mean": "tab:orange",
    "max": "tab:green",
    "attention": "tab:blue",
    "gated attention": "tab:cyan",
    "agreement attention": "tab:purple",
    "geometric median": "tab:pink",
    "one large image, fine-tuned": "tab:red",
    "single image": "tab:gray",
    "plurality of single images": "black",
}
STYLES = {"mean": {"linewidth": 3.5}, "gated attention": {"linestyle": "--"}, "single image": {"linestyle": ":"}}
STYLES["plurality of single images"] = {"linestyle": ":"}


def tables(family: str) -> list[dict[str, Any]]:
    return json.loads((HERE / f"{family}.json").read_text())


def parsed(cell: str) -> tuple[float, float, float]:
    """Value, lower and upper end of "0.97 (0.95–0.99)" or "0.97 [0.95, 0.99]"; thrice the value without an interval."""
    value, low, high = INTERVAL.match(cell).groups()
    return float(value), float(low or value), float(high or value)


def lines(ax: Axes, xs: list[float], rows: dict[str, list[str]], **style: Any) -> None:
    """One line a row, with a band between the ends of its intervals."""
    for name, cells in rows.items():
        values, lows, highs = zip(*(parsed(cell) for cell in cells))
        (line,) = ax.plot(xs, values, marker="o", markersize=3, label=name, **{"linewidth": 1.3} | style.get(name, {}))
        ax.fill_between(xs, lows, highs, color=line.get_color(), alpha=0.12, linewidth=0)
    ax.set_xticks(xs)
    ax.grid(alpha=0.3)


def digits(figure: Figure) -> None:
    table = tables("digits")[2]
    ax = figure.subplots()
    for column, marker, title in ((1, "o", "label aggregated"), (2, "s", "label absent")):
        ax.scatter([], [], color="black", marker=marker, label=title)
        for index, row in enumerate(table["rows"]):
            if row[column] != "–":
                agreement, distance = row[column].split(" / ")
                value, low, high = parsed(agreement)
                error = [[value - low], [high - value]]
                ax.errorbar(float(distance[:-1]), value, error, marker=marker, color=f"C{index}", capsize=2)
    for index, row in enumerate(table["rows"]):
        ax.plot([], [], color=f"C{index}", linewidth=3, label=row[0].replace("`", ""))
    ax.set(xlabel="FD as a multiple of real against real (1 is best)", ylabel="joint agreement", xlim=(1, 2.8))
    ax.set_title("Aggregation lifts agreement and costs distance (3 training seeds, range)", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def shapes_all(figure: Figure) -> None:
    table = tables("shapes_all")[1]
    cells = [row[1:] for row in table["rows"]]
    values = [[float("nan") if cell == "–" else parsed(cell)[0] for cell in row] for row in cells]
    ax = figure.subplots()
    shown = ax.imshow(values, aspect="auto", cmap="viridis", vmin=0.88, vmax=1)
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            ax.text(x, y, cell, ha="center", va="center", fontsize=7, color="white" if values[y][x] < 0.94 else "black")
    ax.set_xticks(range(3), ["mask", "label", "embedding"], fontsize=8)
    ax.set_yticks(range(len(cells)), [row[0] for row in table["rows"]], fontsize=7)
    ax.set_ylabel("given")
    ax.set_title(
        "Every subset given, the rest drawn (n = 128)\nmIoU, accuracy, retrieval@1; * given, read off the image",
        fontsize=9,
    )
    figure.colorbar(shown, shrink=0.5)


def cifar10_masked(figure: Figure) -> None:
    table = tables("cifar10_masked")[0]
    columns = list(zip(*table["rows"]))
    ax = figure.subplots()
    lines(ax, [float(share) for share in columns[0]], dict(zip(table["columns"][1:], map(list, columns[1:]))))
    ax.set(xlabel="share of hidden pixels", ylabel="LPIPS on the hole, lower is better", ylim=(0, None))
    ax.set_title("CIFAR-10, squares, n = 128, 95 % intervals", fontsize=10)
    ax.legend(fontsize=8)


def reconstruction(data: str, steps: int, scale: str) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        table = tables(f"reconstruction_{data}")[0]
        of = {row[1]: row[2:] for row in table["rows"] if row[0] == "mean of five patterns"}
        rows = {name.format(steps=steps): of[row.format(steps=steps)] for name, row in RECONSTRUCTIONS.items()}
        ax = figure.subplots()
        lines(ax, [float(share) for share in table["columns"][2:]], rows)
        ax.set(xlabel="share of hidden pixels", ylabel="LPIPS on the hole, lower is better", yscale=scale)
        ax.set_title(f"{data}: mean of five hole patterns, 64 images, 95 % intervals", fontsize=10)
        ax.legend(fontsize=8)

    return draw


def by_distractors(ax: Axes, table: dict[str, Any], title: str) -> None:
    """Accuracy against the share of distractors, one line a fusion."""
    first = table["columns"].index("0 %")
    rows = {row[0]: row[first : first + 3] for row in table["rows"] if row[0] in COLOURS}
    styles = {name: {"color": COLOURS[name]} | STYLES.get(name, {}) for name in rows}
    lines(ax, [0, 25, 50], rows, **styles)
    ax.set(xlabel="distractors in a set, %", ylim=(0.2, 1.03))
    ax.set_title(title, fontsize=10)


def fusion_accuracy(figure: Figure) -> None:
    axes = figure.subplots(1, 4, sharey=True)
    titles = ("shapes, striped distractors", "the same, linear layer learns too", "COIL-100", "shapes, foreign photos")
    for ax, table, title in zip(axes, tables("fusion_accuracy"), titles):
        by_distractors(ax, table, title)
    axes[0].set_ylabel("accuracy, mean of seeds")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=6)


def retrieval(figure: Figure) -> None:
    ax = figure.subplots()
    by_distractors(ax, tables("retrieval")[0], "COIL-100, objects that were never seen (5 seeds)")
    ax.axhline(0.25, color="black", linewidth=0.8, linestyle="--", label="chance")
    ax.set_ylabel("accuracy, mean of seeds")
    ax.legend(fontsize=7)


def image_sets(figure: Figure) -> None:
    table = tables("image_sets")[0]
    columns = list(zip(*table["rows"]))
    ax = figure.subplots()
    lines(ax, [float(count) for count in columns[0]], dict(zip(table["columns"][1:], map(list, columns[1:]))))
    ax.set(xlabel="members of a set, up to half of them distractors", ylabel="share that is right")
    ax.set_title("Front view and kind against the size of the set, seed 0, 95 % intervals", fontsize=10)
    ax.legend(fontsize=8)


def vlm(figure: Figure) -> None:
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for line, table, model in zip(axes, tables("vlm"), ("LLaVA", "BLIP-2")):
        rows = [row for row in table["rows"] if row[0] in COLOURS][::-1]
        for ax, column, task in zip(line, (1, 2, 3), ("category", "attributes", "caption")):
            for y, row in enumerate(rows):
                value, low, high = parsed(row[column])
                error = [[value - low], [high - value]]
                ax.errorbar(value, y, xerr=error, marker="o", color=COLOURS[row[0]], capsize=2)
            ax.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
            ax.set_title(f"{model}: {task}", fontsize=9)
            ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("accuracy, 95 % over 3 seeds", fontsize=8)


PICTURES: dict[str, tuple[Callable[[Figure], None], tuple[float, float]]] = {
    "digits": (digits, (7.5, 4)),
    "shapes_all": (shapes_all, (6.5, 7)),
    "cifar10_masked": (cifar10_masked, (6, 4)),
    "reconstruction_cifar10": (reconstruction("cifar10", 2, "linear"), (6.5, 4.5)),
    "reconstruction_shapes": (reconstruction("shapes", 20, "log"), (6.5, 4.5)),
    "fusion_accuracy": (fusion_accuracy, (11, 3.8)),
    "retrieval": (retrieval, (6, 4)),
    "image_sets": (image_sets, (6, 4)),
    "vlm": (vlm, (8.5, 4.5)),
}


def main(folder: Path = HERE) -> None:
    for name, (draw, size) in PICTURES.items():
        figure = plt.figure(figsize=size, dpi=90, layout="constrained")
        draw(figure)
        figure.canvas.draw()
        drawn = Image.frombuffer("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba())
        drawn.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(folder / f"{name}.png", optimize=True)
        plt.close(figure)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
