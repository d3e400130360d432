"""The picture at the top of README.md: one network, six questions.

    python docs/pictures/hero.py runs/shapes_all --out docs/images/hero.png

The run is that of experiments/shapes_all.yaml. The given value of row k comes from held-out row k. The seeds are 0
and 1. Nothing is picked. An embedding is shown as the held-out image whose embedding is nearest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

from mmdiff.build import build_table, open_rows
from mmdiff.config import load_config
from mmdiff.data.shapes.render import RGB, SHAPES
from mmdiff.runs import load

CASES = ("nothing", "label", "mask", "embedding", "masked_image", "image")
TITLES = {  # of what the model draws
    "image": "image",
    "mask": "mask",
    "masked_image": "masked\nimage",
    "label": "label",
    "embedding": "embedding\n(nearest)",
}
SAMPLES = 2
MASK_COLOURS = np.concatenate([[[210, 210, 210]], RGB]).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description="The picture at the top of README.md.")
    parser.add_argument("run", type=Path, help="run folder of experiments/shapes_all.yaml")
    parser.add_argument("--out", type=Path, required=True, help="the PNG")
    arguments = parser.parse_args()
    pipeline, config = load(arguments.run), load_config(arguments.run / "config.yaml")
    pipeline.set_progress_bar_config(disable=True)
    held_out = build_table(config, pipeline.model, open_rows(config)[1]).all(1000).values
    show = Shown(pipeline.model, held_out)
    columns = 1 + SAMPLES * len(TITLES)
    figure, axes = plt.subplots(len(CASES), columns, figsize=(columns * 0.86, len(CASES) * 0.86 + 0.7), dpi=100)
    for row, case in enumerate(CASES):
        observed = {} if case == "nothing" else {case: held_out[case][row : row + 1]}
        scales = config.sample.scales(set(observed) - {"image"})
        generators = [torch.Generator().manual_seed(seed) for seed in range(SAMPLES)]
        output = pipeline(SAMPLES, observed, config.sample.steps, scales, generator=generators, output_type="pt")
        show(axes[row, 0], case, observed.get(case))
        axes[row, 0].set_ylabel(case.replace("_", "\n"), fontsize=9)
        for sample in range(SAMPLES):
            for name, axis in zip(TITLES, axes[row, 1 + sample * len(TITLES) :], strict=False):
                show(axis, name, None if name in observed else output.samples[name][sample : sample + 1])
                axis.set_title(TITLES[name] if row == 0 else "", fontsize=8)
    figure.tight_layout(pad=0.4, w_pad=0.2, h_pad=0.2, rect=(0, 0, 1, 0.965))
    heads = {0: (1, "given")} | {1 + k * len(TITLES): (len(TITLES), f"drawn, seed {k}") for k in range(SAMPLES)}
    for first, (width, title) in heads.items():
        left, right = axes[0, first].get_position().x0, axes[0, first + width - 1].get_position().x1
        figure.text((left + right) / 2, 0.985, title, ha="center", va="top", fontsize=10, fontweight="bold")
        if first:
            figure.add_artist(plt.Line2D([left - 0.004] * 2, [0, 1], color="black", linewidth=0.8))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out)


class Shown:
    """Draws one value of any of the five modalities into one field; None is one that was given."""

    def __init__(self, model: Any, held_out: dict[str, torch.Tensor]) -> None:
        self.modalities = model.modalities
        self.images = held_out["image"]
        self.directions = torch.nn.functional.normalize(held_out["embedding"], dim=1)

    def __call__(self, axis: Axes, name: str, value: torch.Tensor | None) -> None:
        axis.set(xticks=[], yticks=[])
        if value is None or name == "label":
            text, colour = ("given", "0.6") if value is None else (SHAPES[int(value)], "black")
            axis.text(0.5, 0.5, "–" if name == "nothing" else text, color=colour, ha="center", va="center", fontsize=9)
            axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
            return
        if name == "embedding":
            nearest = (self.directions @ torch.nn.functional.normalize(value, dim=1)[0]).argmax()
            name, value = "image", self.images[nearest][None]
        if name == "mask":  # class 0 is the background, class k the k-th colour
            axis.imshow(MASK_COLOURS[value[0].numpy()], interpolation="nearest")
        else:
            axis.imshow(
                np.asarray(self.modalities[name].postprocess(value)[0].convert("RGBA")), interpolation="nearest"
            )


if __name__ == "__main__":
    main()
