"""Pictures: where tiles lie, what a grid shows, and that plots are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmdiff import plots, report
from mmdiff.config import SampleConfig
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.schedulers import MTDiffusionScheduler


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_tiles_lie_in_rows_with_gaps(mode: str) -> None:
    pixels = [np.full((2, 3) if mode == "L" else (2, 3, 3), 40 * (k + 1), dtype=np.uint8) for k in range(5)]
    canvas = plots.tile([Image.fromarray(p) for p in pixels], columns=2, gap=1, zoom=2)
    assert (canvas.mode, canvas.size) == (mode, (2 * (6 + 1) + 1, 3 * (4 + 1) + 1))
    found = np.asarray(canvas).reshape(canvas.height, canvas.width, -1)[..., 0]
    for index in range(5):
        top, left = 1 + 5 * (index // 2), 1 + 7 * (index % 2)
        assert (found[top : top + 4, left : left + 6] == 40 * (index + 1)).all()
    assert (found[0] == 128).all() and (found[:, 7] == 128).all() and (found[-4:, 8:] == 128).all()


def test_a_grid_has_one_row_per_class(finished_run: Path, tmp_path: Path) -> None:
    pipeline = MTDiffusionPipeline.from_pretrained(finished_run / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    path = plots.save_grid(pipeline, tmp_path / "new" / "grid.png", SampleConfig(steps=2), seed=4)
    rows = torch.arange(10).repeat_interleave(plots.COLUMNS)
    generator = torch.Generator().manual_seed(4)
    images = pipeline(observed={"label": rows}, num_inference_steps=2, generator=generator).samples["image"]
    with Image.open(path) as grid:
        assert np.array_equal(np.asarray(grid), np.asarray(plots.tile(images, plots.COLUMNS, zoom=3)))


def test_plots_are_written(finished_run: Path, tmp_path: Path) -> None:
    weights = {"label": {"schedule": "constant"}, "depth": {"schedule": "bump"}}
    scheduler = MTDiffusionScheduler(num_train_timesteps=50, weights=weights)
    written = [
        plots.weight_schedules(scheduler, tmp_path / "weights.png"),
        plots.weight_schedules(MTDiffusionScheduler(num_train_timesteps=50), tmp_path / "plain.png"),
        plots.curves(finished_run / "metrics.jsonl", tmp_path / "curves.png"),
    ]
    for path in written:
        with Image.open(path) as picture:
            assert picture.width > picture.height > 200
            assert len(picture.convert("L").getcolors()) > 10  # lines, not a blank page


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_the_forward_process_runs_from_the_image_to_noise(channels: int, mode: str) -> None:
    scheduler = MTDiffusionScheduler(num_train_timesteps=50, weights={"label": {"schedule": "constant"}})
    z_0 = torch.full((2, channels, 8, 8), 0.5)
    picture = plots.forward_process(scheduler, z_0, {"label": torch.ones_like(z_0)}, columns=4)
    assert (picture.mode, picture.size) == (mode, (4 * 50 + 2, 2 * 50 + 2))  # 8 pixels six times enlarged
    pixels = np.asarray(picture).reshape(102, 202, -1)
    assert pixels[2:50, 2:50].std() < pixels[2:50, 152:200].std()  # t = 1 beside t = T


def test_weights_are_described_by_their_peak() -> None:
    scheduler = MTDiffusionScheduler(num_train_timesteps=50, weights={"label": {"schedule": "bump", "scale": 0.75}})
    anchor, label = report.weights(scheduler, columns=20)
    table = scheduler.cumulative_weights("label")
    assert anchor.startswith("√ā_t") and "peak 0.999 at t = 1," in anchor
    assert f"peak 0.75 at t = {int(table.argmax()) + 1}, at T {float(table[-1]):.2g}" in label
    assert label.count("█") >= 1 and len(label.split()[2]) == 20
