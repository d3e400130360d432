"""Shapes are a function of (seed, split, index) with the laws they state, and the rules read back what was drawn."""

from __future__ import annotations

import pickle
import time
from functools import cache
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from refusals import refused
from scipy import special, stats
from torch import Tensor
from torch.utils.data import DataLoader

from mmdiff.data import Table
from mmdiff.data.shapes.readers import RULES, read_embedding, read_label, read_mask, read_object
from mmdiff.data.shapes.render import (
    COLORS,
    CONCENTRATION,
    EMBEDDING_SIZE,
    NORM_LOG_STD,
    NORM_MEDIAN,
    RADIUS,
    RGB,
    SHAPES,
    Shapes,
    Thing,
    caption,
    coverage,
    load,
    mean_direction,
)

COUNT = 400
ATTRIBUTES = ["label", "color", "x", "y", "radius"]


@cache
def column(name: str, count: int = COUNT, split: str = "train", seed: int = 0) -> np.ndarray:
    """(count, …) of one column, stacked."""
    rows = load(rows=count, validation_rows=count, seed=seed)[split].select_columns([name])
    return np.stack([np.asarray(row[name]) for row in rows])


def things(count: int = COUNT) -> Thing:
    return Thing(*(column(name, count) for name in ATTRIBUTES))


def images(noise: float = 0.0) -> Tensor:
    """(COUNT, 3, 32, 32) in [−1, 1] and beyond, by the noise."""
    pixels = torch.from_numpy(column("image")).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels + noise * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))


def directions(count: int = COUNT) -> np.ndarray:
    embeddings = column("embedding", count)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return np.array_equal(np.asarray(one), np.asarray(other))


def same_rows(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(same(one[name], other[name]) for name in one)


# --------------------------------------------------------------------------------------------------------------- rows


def test_a_row_depends_on_seed_split_and_index_only() -> None:
    rows, longer = load(rows=10)["train"], load(rows=5000, validation_rows=7)["train"]
    assert all(same_rows(rows[i], longer[i]) for i in (7, 0, 3, 7))
    for other in (load(seed=1)["train"], load()["validation"]):
        for name in ("image", "x", "embedding", "views"):
            assert not any(same(rows[i][name], other[i][name]) for i in range(10))


def test_splits_and_rows_are_disjoint() -> None:
    places = np.concatenate([column("x", 2000, split) for split in ("train", "validation")])
    assert len(np.unique(places)) == 4000


def test_rows_are_values_of_the_features() -> None:
    rows = load(rows=3, validation_rows=2, size=24, views=3)["train"]
    assert list(rows.features) == rows.column_names == list(rows[0])
    stored = datasets.Dataset.from_list(list(rows), features=rows.features)
    for row, back in zip(rows, stored, strict=True):
        assert row["image"].mode == "RGB" and row["mask"].mode == "L" and row["image"].size == (24, 24)
        assert [view.mode for view in row["views"]] == ["RGB"] * 3
        assert same_rows(row, back)
    assert rows.features["label"].names == list(SHAPES) and rows.features["color"].names == list(COLORS)


def test_rows_are_a_table_of_their_size() -> None:
    splits = load(rows=5, validation_rows=3)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 5, "validation": 3}
    rows = splits["train"]
    assert len(list(rows)) == 5 and same_rows(rows[-1], rows[4])
    for index in (5, -6):
        with pytest.raises(IndexError):
            rows[index]


def test_selections_keep_rows() -> None:
    rows = load(rows=10)["train"]
    chosen = rows.select([9, 2, 2]).select_columns(["x", "label"])
    assert list(chosen) == [{"x": rows[i]["x"], "label": rows[i]["label"]} for i in (9, 2, 2)]
    assert chosen.select([1])[0] == chosen[1] and list(chosen.features) == ["x", "label"]
    assert len(rows) == 10 and "image" in rows.column_names
    with pytest.raises(IndexError):
        rows.select([10])


def test_rows_survive_pickling() -> None:
    rows = load(rows=4)["train"].select([3, 1]).select_columns(["image", "embedding", "views"])
    again = pickle.loads(pickle.dumps(rows))
    assert isinstance(again, Shapes) and all(map(same_rows, rows, again))


def test_only_what_is_asked_for_is_made() -> None:
    def milliseconds(rows: Shapes) -> float:
        times = []
        for index in range(50):
            start = time.perf_counter()
            rows[index]
            times.append(time.perf_counter() - start)
        return 1e3 * float(np.median(times))

    rows = load(size=256)["train"]
    label = milliseconds(rows.select_columns(["label"]))
    assert label < milliseconds(rows.select_columns(["image"])) / 5
    assert label < 0.5


def test_a_table_and_a_loader_with_workers_read_them() -> None:
    rows = load(rows=6)["train"]
    preprocess = {
        "image": lambda raw: torch.from_numpy(np.asarray(raw) / 127.5 - 1).permute(2, 0, 1).float(),
        "shape": torch.tensor,
        "embedding": torch.tensor,
    }
    placeholders = {"image": torch.zeros(3, 32, 32), "shape": torch.tensor(0), "embedding": torch.zeros(32)}
    columns = {"image": "image", "shape": "label", "embedding": "embedding"}
    table = Table(rows, columns, preprocess, placeholders, cache_mib=0)
    batch = table.all()
    assert all(mask.all() for mask in batch.present.values())
    assert batch.values["shape"].tolist() == [row["label"] for row in rows]
    direct = DataLoader(rows.select_columns(["x"]), batch_size=None, num_workers=2)
    assert [float(row["x"]) for row in direct] == [row["x"] for row in rows]


def test_what_cannot_be_used_is_named() -> None:
    for key, value in [("rows", 0), ("validation_rows", -1), ("views", -1), ("size", 8)]:
        with refused(key, value):
            load(**{key: value})


def test_an_unknown_column_is_named() -> None:
    with refused("column", "depth"):
        load()["train"].select_columns(["image", "depth"])


# --------------------------------------------------------------------------------------------------------------- laws


def test_classes_are_uniform_and_independent() -> None:
    rows = things(3000)
    table = np.zeros((len(SHAPES), len(COLORS)))
    np.add.at(table, (rows.label, rows.color), 1)
    assert stats.chisquare(table.flatten()).pvalue > 1e-3


def test_places_are_uniform_and_objects_are_inside() -> None:
    rows = things(3000)
    assert stats.kstest((rows.radius - RADIUS[0]) / (RADIUS[1] - RADIUS[0]), "uniform").pvalue > 1e-3
    for part in (rows.x, rows.y):
        assert stats.kstest((part - rows.radius) / (1 - 2 * rows.radius), "uniform").pvalue > 1e-3
    border = column("mask").copy()
    border[:, 1:-1, 1:-1] = 0
    touching = border.any(axis=(1, 2))
    gap = np.minimum(*[np.minimum(part, 1 - part) for part in (column("x"), column("y"))]) - column("radius")
    assert not touching[gap > 1 / 32].any()


def test_a_mask_is_one_object_of_its_colour_and_size() -> None:
    rows, masks = things(), column("mask")
    assert all(set(np.unique(mask)) == {0, color + 1} for mask, color in zip(masks, rows.color, strict=True))
    for mask, x, y, radius in zip(masks, rows.x, rows.y, rows.radius, strict=True):
        down, across = np.nonzero(mask)
        for found, centre in ((across, x), (down, y)):
            assert abs(found.min() / 32 - (centre - radius)) < 2.1 / 32  # a triangle's tip is thin
            assert abs((found.max() + 1) / 32 - (centre + radius)) < 1.1 / 32


def test_anti_aliasing_is_the_area_of_the_pixels() -> None:
    for label in range(len(SHAPES)):
        place = (0.47, 0.53, 0.31)
        fine = coverage(label, *place, 32 * 16) > 0.5
        area = fine.reshape(32, 16, 32, 16).mean(axis=(1, 3))
        difference = np.abs(coverage(label, *place, 32) - area)
        assert difference.mean() < 0.004 and difference.max() < 0.35  # a corner's distance is no area


def test_pictures_are_the_colour_on_dark_grey() -> None:
    pictures, masks, rows, contrasts = column("image").astype(int), column("mask"), things(), []
    for pixels, mask, color in zip(pictures, masks, rows.color, strict=True):
        off = np.abs(pixels - RGB[color]).max(axis=2)
        assert off[mask > 0].min() == 0 and np.median(off[mask > 0]) == 0
        background = pixels[(mask == 0) & (np.ptp(pixels, axis=2) == 0)]
        assert len(background) > 32 and background.min() >= 8 and background.max() <= 82
        contrasts.append(np.ptp(background))
    assert np.mean(contrasts) > 3 and np.max(contrasts) <= 24


def test_captions_say_what_is_there() -> None:
    assert caption(Thing(0, 0, 0.21, 0.22, 0.2)) == "a small red circle at the top left"
    assert caption(Thing(3, 4, 0.5, 0.5, 0.36)) == "a large blue cross in the centre"
    assert caption(Thing(2, 1, 0.5, 0.7, 0.29)) == "a medium yellow triangle at the bottom"
    rows = load(rows=100)["train"].select_columns(["caption", "label", "color"])
    for row in rows:
        assert row["caption"].split()[2:4] == [COLORS[row["color"]], SHAPES[row["label"]]]
    assert len({row["caption"] for row in rows}) > 50


def test_views_show_the_colour_elsewhere_and_only_a_part() -> None:
    shares = []
    for row in load(rows=100)["train"].select_columns(["views", "color", "image"]):
        assert len(row["views"]) == 4
        pixels = np.stack([np.asarray(view) for view in row["views"]])
        covered = (pixels == 128).all(axis=3)
        seen = read_mask(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
        assert seen.flatten(1).unique(dim=1).unique().tolist() == [0, row["color"] + 1]
        assert seen.flatten(1).any(dim=1).all()
        assert not any(same(one, other) for i, one in enumerate(pixels) for other in pixels[:i])
        shares += covered.mean(axis=(1, 2)).tolist()
    assert min(shares) > 0.02 and max(shares) < 0.85 and np.std(shares) > 0.1


# --------------------------------------------------------------------------------------------------------- embeddings


def test_mean_directions_are_unit_vectors_that_vary_smoothly() -> None:
    rows = things()
    mean = mean_direction(rows)
    assert np.allclose(np.linalg.norm(mean, axis=1), 1)
    moved = mean_direction(rows._replace(x=np.asarray(rows.x) + 1e-3))
    assert 0 < np.linalg.norm(moved - mean, axis=1).max() < 0.03
    one = Thing(*(value[7] for value in rows))
    assert np.allclose(mean_direction(one), mean[7])


def test_objects_of_another_kind_lie_apart() -> None:
    kinds = [(label, color) for label in range(len(SHAPES)) for color in range(len(COLORS))]
    labels, colors = np.transpose(kinds)
    place = np.full(len(kinds), 0.5)
    mean = mean_direction(Thing(labels, colors, place, place, place / 2))
    cosine = mean @ mean.T - 2 * np.eye(len(kinds))
    assert cosine.max() < 0.8  # the concentration puts a draw at 0.985 from its own mean


def test_directions_have_the_stated_concentration() -> None:
    cosine = (mean_direction(things(3000)) * directions(3000)).sum(axis=1)
    order = EMBEDDING_SIZE / 2
    expected = special.ive(order, CONCENTRATION) / special.ive(order - 1, CONCENTRATION)  # A(κ), Mardia and Jupp
    assert expected == pytest.approx(0.985, abs=5e-4)
    assert cosine.mean() == pytest.approx(expected, abs=5 * cosine.std() / np.sqrt(3000))
    law = stats.vonmises_fisher(np.eye(EMBEDDING_SIZE)[0], CONCENTRATION)
    assert stats.ks_2samp(cosine, law.rvs(3000, random_state=0)[:, 0]).pvalue > 1e-3


def test_deviations_from_the_mean_direction_are_isotropic() -> None:
    mean = mean_direction(things(3000))
    rest = directions(3000) - (mean * directions(3000)).sum(axis=1, keepdims=True) * mean
    rest /= np.linalg.norm(rest, axis=1, keepdims=True)
    assert np.abs(rest.mean(axis=0)).max() < 5 / np.sqrt(3000 * EMBEDDING_SIZE)
    frame = np.linalg.qr(np.random.default_rng(0).standard_normal((EMBEDDING_SIZE, EMBEDDING_SIZE)))[0]
    across = frame[0] - (mean @ frame[0])[:, None] * mean  # any tangent sees variance 1 / (D − 1)
    part = (rest * across).sum(axis=1) / np.linalg.norm(across, axis=1)
    assert part.var() == pytest.approx(1 / (EMBEDDING_SIZE - 1), rel=0.15)


def test_norms_are_log_normal_and_independent_of_the_direction() -> None:
    log_norm = np.log(np.linalg.norm(column("embedding", 3000), axis=1))
    assert stats.kstest((log_norm - np.log(NORM_MEDIAN)) / NORM_LOG_STD, "norm").pvalue > 1e-3
    correlation = np.corrcoef(log_norm, directions(3000).T)[0, 1:]
    assert np.abs(correlation).max() < 5 / np.sqrt(3000)


# -------------------------------------------------------------------------------------------------------------- rules


def test_masks_are_read_back() -> None:
    for noise, least in [(0.0, 0.99), (0.1, 0.95)]:
        found, truth = read_mask(images(noise)).numpy(), column("mask")
        overlap = [((found == k) & (truth == k)).sum() / ((found == k) | (truth == k)).sum() for k in range(7)]
        assert found.shape == truth.shape and found.dtype == np.int64
        assert np.mean(overlap) >= least


def test_labels_are_read_back() -> None:
    for noise, least in [(0.0, 0.995), (0.1, 0.98)]:
        found = read_label(images(noise))
        assert found.dtype == torch.int64
        assert (found.numpy() == column("label")).mean() >= least


def test_attributes_are_read_back() -> None:
    for noise, pixels in [(0.0, 0.03), (0.1, 0.1)]:
        found, truth = read_object(images(noise)), things()
        assert np.array_equal(found.color, truth.color)
        for name in ("x", "y", "radius"):
            error = np.asarray(getattr(found, name)) - getattr(truth, name)
            assert np.sqrt((error**2).mean()) * 32 < pixels


def test_embeddings_recover_their_row_among_64() -> None:
    for noise in [0.0, 0.1]:
        queries, rows = read_embedding(images(noise)), directions()
        assert queries.dtype == torch.float32 and queries.shape == (COUNT, EMBEDDING_SIZE)
        random, hits = np.random.default_rng(0), []
        for _ in range(100):
            chosen = random.choice(COUNT, 64, replace=False)
            hits.append((queries.numpy()[chosen] @ rows[chosen].T).argmax(axis=1) == np.arange(64))
        assert np.mean(hits) >= 0.99


def test_rules_answer_for_images_without_an_object_and_row_by_row() -> None:
    for rule in RULES:
        nothing = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32), torch.full((3, 32, 32), -1.0)])
        noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        answers = RULES[rule](torch.cat([nothing, noise, images()[:3]]))
        assert len(answers) == 9 and answers.isfinite().all()
        assert torch.allclose(RULES[rule](images()[:3]).double(), answers[6:].double(), atol=1e-5)
        assert rule != "mask" or not answers[:3].any()


def test_greys_are_background() -> None:
    greys = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    assert not read_mask(greys).any()
