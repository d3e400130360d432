"""Pictures: pixels of tiles are those of samples, titles and legends stand beside them, plots have no empty axes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mmdiff import grids, plots
from mmdiff.cli import show as report
from mmdiff.config import SampleConfig, parse_config
from mmdiff.model import MTDiffusionModel
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.schedulers import MTDiffusionScheduler
from mmdiff.training import train

GROUND = (128, 128, 128)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_tiles_lie_in_rows_with_gaps(mode: str) -> None:
    pixels = [np.full((2, 3) if mode == "L" else (2, 3, 3), 40 * (k + 1), dtype=np.uint8) for k in range(5)]
    canvas = grids.tile([Image.fromarray(p) for p in pixels], columns=2, gap=1, zoom=2)
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
    canvas = grids.tile(ids, columns=3, zoom=2)
    assert (ids[0].mode, canvas.mode, canvas.size) == ("P", "RGB", (3 * 10 + 2, 12))
    for k in range(3):
        assert (inside(canvas, k, 3, 8) == palette[3 * k : 3 * k + 3]).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_tiles_show_the_ground_through_their_holes(mode: str) -> None:
    picture = Image.new(mode, (4, 4), (200, 255) if mode == "LA" else (200, 200, 200, 255))
    picture.paste((5, 0) if mode == "LA" else (5, 250, 5, 0), (0, 0, 4, 2))  # the upper half is a hole
    canvas = grids.tile([picture, picture], columns=1)
    assert (canvas.mode, canvas.size) == ("RGB", (4 + 2 * 2, 2 * (4 + 2) + 2))
    for index in range(2):
        assert (inside(canvas, index, 1, 4)[:2] == GROUND).all() and (inside(canvas, index, 1, 4)[2:] == 200).all()


def ink(picture: Image.Image) -> bool:
    """Whether something is written on white."""
    return picture.size != (0, 0) and np.asarray(picture.convert("L")).min() < 128


def test_columns_of_any_mode_have_titles_and_the_pixels_of_their_samples() -> None:
    ids = Image.fromarray(np.ones((32, 32), dtype=np.uint8))
    ids.putpalette([0, 0, 0, 9, 99, 199])
    greys, reds = (
        [Image.new("L", (32, 32), 40 * k) for k in range(4)],
        [Image.new("RGB", (32, 32), (250, k, 0)) for k in range(4)],
    )
    columns = {"image": greys, "truth": reds, "read": [ids] * 4}
    canvas, plain = (
        grids.table(columns),
        grids.tile(
            [image.convert("RGB") for row in zip(greys, reds, [ids] * 4, strict=True) for image in row], 3, zoom=3
        ),
    )
    assert canvas.width == plain.width == 3 * 98 + 2
    top = next(y for y in range(canvas.height) if canvas.getpixel((0, y)) == GROUND)
    assert canvas.crop((0, top, *(plain.width, top + plain.height))).tobytes() == plain.tobytes()
    for left in (0, 98, 196):
        assert ink(canvas.crop((left, 0, left + 98, top)))
    legend = canvas.crop((0, top + plain.height, *canvas.size))
    assert (9, 99, 199) in {colour for _, colour in legend.getcolors()} and grids.table(
        columns
    ).tobytes() == canvas.tobytes()


@pytest.mark.parametrize("titles", [("a", "b"), ("a very long title", "b")])
def test_titles_and_captions_stand_outside_the_images(titles: tuple[str, ...]) -> None:
    images = [Image.new("RGB", (16, 16), (0, 60 * k, 255)) for k in range(4)]
    rows = [images[:2], images[2:]]
    body = grids.tile(images, 2, zoom=3)
    canvas = grids.grid(rows, titles, ("first", "second"))
    left, top = canvas.width - body.width, canvas.height - body.height
    assert canvas.crop((left, top, *canvas.size)).tobytes() == body.tobytes()
    for k in (0, 1):
        assert ink(canvas.crop((0, top + 50 * k, left, top + 50 * k + 50)))
        assert ink(canvas.crop((left + 50 * k, 0, left + 50 * k + 50, top)))
    for words, lines in (("one", 1), ("a caption longer", 3), ("one_word_longer_than_its_image", 1), ("many " * 99, 5)):
        below = grids.grid(rows, captions=[["one", words], ["three", "four"]])
        height = lines * (grids.FONT_SIZE + 2) + 2
        assert below.size == (body.width, body.height + 2 * height)
        for k in range(4):
            column, row = 2 + 50 * (k % 2), 2 + (50 + height) * (k // 2)
            assert below.crop((column, row, column + 48, row + 48)).getcolors() == [(48 * 48, (0, 60 * k, 255))]
            assert ink(below.crop((column, row + 50, column + 48, row + 50 + grids.FONT_SIZE)))


def test_maps_share_one_range_and_a_colour_bar() -> None:
    maps = [np.full((1, 4, 4), value, dtype=np.float32) for value in (-2.0, 0.0, 6.0)]
    images, (legend,) = grids.pictures("depth", maps)
    low, middle, high = (image.getpixel((0, 0)) for image in images)
    assert legend.text == "depth: -2 … 6" and low != middle != high
    assert (legend.swatch.getpixel((0, 0)), legend.swatch.getpixel((legend.swatch.width - 1, 0))) == (low, high)
    assert grids.pictures("depth", maps[:1])[0][0].size == (4, 4)  # a constant map has a range of zero
    endless = np.array([[[1.0, np.inf, np.nan, 3.0]], [[9.0] * 4]])
    assert grids.pictures("depth", [endless])[1][0].text == "depth, channel 0: 1 … 3"
    assert grids.pictures("label", [3, 4]) == ([], []) and grids.pictures("vector", [np.zeros(3)]) == ([], [])


def test_classes_of_ids_have_their_names_in_the_legend() -> None:
    ids = Image.fromarray(np.array([[0, 2]], dtype=np.uint8))
    ids.putpalette([1, 2, 3, 4, 5, 6, 7, 8, 9])
    legend = grids.pictures("mask", [ids], ["sky", "road", "tree"])[1]
    assert [(one.text, one.swatch.getpixel((0, 0))) for one in legend] == [
        ("mask: sky", (1, 2, 3)),
        ("tree", (7, 8, 9)),
    ]
    wide = Image.fromarray(np.array([[0, 300]], dtype=np.uint16))
    assert grids.pictures("mask", [wide])[1][0].text == "mask: 0 … 300"


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


def test_the_command_draws_all_that_can_be_seen_side_by_side(
    shapes_run: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    out, each = tmp_path / "new" / "grid.png", tmp_path / "each"
    answer = cli("sample", shapes_run, "--num", 6, "--out", out, "--save-each", each)
    assert answer.code == 0, answer.err
    assert [path.name for path in out.parent.iterdir()] == ["grid.png"] and f"wrote {out}" in answer.out
    with Image.open(out) as grid:
        top = next(y for y in range(grid.height) if grid.getpixel((0, y)) == GROUND)
        for k in range(6):
            for column, name in enumerate(("image", "mask", "masked_image")):
                with Image.open(each / name / f"{k:04d}.png") as sample:
                    tile = grids.tile([sample.convert("RGBA")], 1, zoom=3).crop((2, 2, 50, 50))
                x, y = 2 + 50 * (3 * (k % 2) + column), top + 2 + (50 + grids.FONT_SIZE + 4) * (k // 2)
                assert grid.crop((x, y, x + 48, y + 48)).tobytes() == tile.tobytes()
    assert "label: " in answer.out and "embedding: 6 arrays of shape " in answer.out


def test_the_command_overwrites_no_grid(shapes_run: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_text("mine")
    answer = cli("sample", shapes_run, "--num", 2, "--out", tmp_path / "grid.png")
    assert answer.code == 2 and answer.complaint == f"--out = '{tmp_path / 'grid.png'}': exists; choose another file"
    assert (tmp_path / "grid.png").read_text() == "mine"


def test_a_grid_has_one_row_per_class(finished_run: Path, tmp_path: Path) -> None:
    pipeline = MTDiffusionPipeline.from_pretrained(finished_run / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    path = plots.save_grid(pipeline, tmp_path / "new" / "grid.png", SampleConfig(steps=2), seed=4)
    rows = torch.arange(10).repeat_interleave(plots.COLUMNS)
    generator = torch.Generator().manual_seed(4)
    images = pipeline(observed={"label": rows}, num_inference_steps=2, generator=generator).samples["image"]
    body = grids.tile(images, plots.COLUMNS, zoom=3).convert("RGB")
    with Image.open(path) as grid:
        left = grid.width - body.width
        assert grid.height == body.height and grid.crop((left, 0, *grid.size)).tobytes() == body.tobytes()
        for row in range(10):  # the class
            assert ink(grid.crop((0, 2 + 50 * row, left, 50 + 50 * row)))


def test_a_grid_has_no_rows_of_classes_that_training_never_gave(finished_run: Path, tmp_path: Path) -> None:
    """The label of this model was neither observed nor weighted in training."""
    trained = MTDiffusionPipeline.from_pretrained(finished_run / "pipeline")
    model = MTDiffusionModel.from_config({**trained.model.config, "observable": []})
    scheduler = type(trained.scheduler).from_config({**trained.scheduler.config, "weights": {}})
    pipeline = MTDiffusionPipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    path = plots.save_grid(pipeline, tmp_path / "grid.png", SampleConfig(steps=2), seed=4)
    drawn = pipeline(batch_size=plots.COLUMNS**2, num_inference_steps=2, generator=torch.Generator().manual_seed(4))
    joint = grids.sample_grid(model, drawn.samples, plots.COLUMNS, [])
    with Image.open(path) as grid:
        assert grid.size == joint.size and grid.convert("RGB").tobytes() == joint.convert("RGB").tobytes()


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


@pytest.mark.parametrize("channels", [1, 3])
def test_the_forward_process_runs_from_the_image_to_noise(channels: int) -> None:
    scheduler = MTDiffusionScheduler(num_train_timesteps=50, weights={"label": {"schedule": "constant"}})
    z_0 = torch.full((2, channels, 8, 8), 0.5)
    picture = plots.forward_process(scheduler, z_0, {"label": torch.ones_like(z_0)}, columns=4)
    top = picture.height - 102
    assert picture.width == 4 * 50 + 2  # 8 pixels six times enlarged
    for column in range(4):  # its time
        assert ink(picture.crop((50 * column, 0, 50 * column + 50, top)))
    pixels = np.asarray(picture)[top:]
    assert pixels[2:50, 2:50].std() < pixels[2:50, 152:200].std()  # t = 1 beside t = T


@pytest.mark.parametrize("drawn", [1, 2, 4])
def test_terms_near_zero_get_no_panel_and_no_axis_is_empty(
    drawn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    terms = {"l0": 1e-9, "l3": 0.0} | {f"l2/{k}": 1.0 for k in range(drawn - 1)}
    lines = [{"step": step, "loss": 2.0 / step, "learning_rate": 1.0} | terms for step in (1, 2, 3)]
    families = {"cosine/a:b": 0.1, "cosine/a:c": -0.1, "norm/a": 1.0, "weight/a": 0.5, "images_per_second": 9.0}
    lines[1] |= dict(list(families.items())[: 2 * drawn - 1])  # 1, 3 and all; measured now and then
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plots.curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    shared = ["cosines of gradients", "norms of gradients", "learned weights", "images per second"]
    expected = {"loss", *(f"l2/{k}" for k in range(drawn - 1)), *shared[: {1: 1, 2: 2, 4: 4}[drawn]]}
    assert {axis.get_title() for axis in figures[0].axes} == expected
    assert all(axis.lines for axis in figures[0].axes) and "l0, l3" in figures[0].get_suptitle()
    plots.weight_schedules(MTDiffusionScheduler(num_train_timesteps=50), tmp_path / "plain.png")
    assert [len(axis.lines) > 1 for axis in figures[1].axes] == [True]


def test_weights_are_described_by_their_peak() -> None:
    scheduler = MTDiffusionScheduler(num_train_timesteps=50, weights={"label": {"schedule": "bump", "scale": 0.75}})
    anchor, label = report.weights(scheduler, columns=20)
    table = scheduler.cumulative_weights("label")
    assert anchor.startswith("s_t anchor") and "peak 0.999 at t = 1," in anchor
    assert f"peak 0.75 at t = {int(table.argmax()) + 1}, at T {float(table[-1]):.2g}" in label
    assert label.count("█") >= 1 and len(label.split()[2]) == 20
