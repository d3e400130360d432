"""Pictures: where tiles lie, what a grid shows, and that plots are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmdiff import plots
from mmdiff.cli import show as report
from mmdiff.config import SampleConfig, parse_config
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.schedulers import MTDiffusionScheduler
from mmdiff.training import train

GROUND = (128, 128, 128)


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


def inside(canvas: Image.Image, index: int, columns: int, size: int, gap: int = 2) -> np.ndarray:
    """The pixels of one square tile."""
    row, column = divmod(index, columns)
    top, left = gap + row * (size + gap), gap + column * (size + gap)
    return np.asarray(canvas)[top : top + size, left : left + size]


def test_tiles_of_ids_have_the_colours_of_their_palette() -> None:
    ids = [Image.fromarray(np.full((4, 4), k, dtype=np.uint8)) for k in range(3)]
    palette = [10, 20, 30, 40, 50, 60, 70, 80, 90]
    for picture in ids:
        picture.putpalette(palette)
    canvas = plots.tile(ids, columns=3, zoom=2)
    assert (ids[0].mode, canvas.mode, canvas.size) == ("P", "RGB", (3 * 10 + 2, 12))
    for k in range(3):
        assert (inside(canvas, k, 3, 8) == palette[3 * k : 3 * k + 3]).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_tiles_show_the_ground_through_their_holes(mode: str) -> None:
    picture = Image.new(mode, (4, 4), (200, 255) if mode == "LA" else (200, 200, 200, 255))
    picture.paste((5, 0) if mode == "LA" else (5, 250, 5, 0), (0, 0, 4, 2))  # the upper half is a hole
    canvas = plots.tile([picture, picture], columns=1)
    assert (canvas.mode, canvas.size) == ("RGB", (4 + 2 * 2, 2 * (4 + 2) + 2))
    for index in range(2):
        assert (inside(canvas, index, 1, 4)[:2] == GROUND).all() and (inside(canvas, index, 1, 4)[2:] == 200).all()


def test_pictures_of_any_mode_stand_side_by_side(tmp_path: Path) -> None:
    ids = Image.fromarray(np.ones((32, 32), dtype=np.uint8))
    ids.putpalette([0, 0, 0, 9, 99, 199])
    rows = [[Image.new("L", (32, 32), 40 * k), Image.new("RGB", (32, 32), (250, k, 0)), ids] for k in range(4)]
    path = plots.side_by_side(rows, tmp_path / "new" / "rows.png")
    with Image.open(path) as canvas:
        assert (canvas.mode, canvas.size) == ("RGB", (3 * 98 + 2, 4 * 98 + 2))  # three times enlarged
        for k in range(4):
            for column, colour in enumerate([(40 * k,) * 3, (250, k, 0), (9, 99, 199)]):
                assert (inside(canvas, 3 * k + column, 3, 96) == colour).all()


@pytest.fixture(scope="module")
def shapes_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step on shapes: three modalities that are pictures and two that are not."""
    names = ("image", "mask", "masked_image", "label", "embedding")
    tree = {
        "name": "tiny",
        "output": str(tmp_path_factory.mktemp("shapes") / "run"),
        "data": {
            "source": "shapes",
            "options": {"rows": 16, "validation_rows": 4, "size": 16},
            "masking": {"masked_image": {}},
        },
        "modalities": {name: {"kind": name} for name in names},
        "backbone": {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8},
        "scheduler": {"num_train_timesteps": 50},
        "train": {"steps": 1, "batch_size": 4, "threads": 1},
        "sample": {"steps": 1},
        "evaluate": {"at_end": False},
    }
    return train(parse_config(tree))


def test_the_command_draws_one_grid_per_kind_of_picture(
    shapes_run: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "grid.png"
    answer = cli("sample", shapes_run, "--observe", "label=2", "--num", 6, "--out", out)
    assert answer.code == 0, answer.err
    assert sorted(path.name for path in out.parent.iterdir()) == ["grid-mask.png", "grid-masked_image.png", "grid.png"]
    for path in out.parent.iterdir():
        assert f"wrote {path}" in answer.out
        with Image.open(path) as grid:
            assert (grid.mode, grid.size) == ("RGB", (2 * 50 + 2, 3 * 50 + 2))  # 16 pixels three times enlarged
    assert "label: 2 2 2 2 2 2" in answer.out and "embedding: [" in answer.out


def test_the_command_overwrites_no_grid(shapes_run: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    for taken in ("grid.png", "grid-mask.png"):
        folder = tmp_path / taken
        folder.mkdir()
        (folder / taken).write_text("mine")
        answer = cli("sample", shapes_run, "--num", 2, "--out", folder / "grid.png")
        assert answer.code == 2 and answer.complaint == f"--out = '{folder / taken}': exists; choose another file"
        assert [path.name for path in folder.iterdir()] == [taken] and (folder / taken).read_text() == "mine"


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
    assert anchor.startswith("s_t anchor") and "peak 0.999 at t = 1," in anchor
    assert f"peak 0.75 at t = {int(table.argmax()) + 1}, at T {float(table[-1]):.2g}" in label
    assert label.count("█") >= 1 and len(label.split()[2]) == 20
