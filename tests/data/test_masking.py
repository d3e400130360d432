"""Holes depend on (seed, position) only, hide the asked share, and have the form that their pattern promises."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from refusals import refused
from scipy import ndimage
from torch import Tensor

from mmdiff.data.masking import PATTERNS, known_masks

HEIGHT, WIDTH = 32, 40
SQUARE = 4  # an eighth of the shorter side
UNITS = {
    "squares": SQUARE**2,
    "box": WIDTH,
    "half": WIDTH,
    "checkerboard": (HEIGHT // 8) * (WIDTH // 8),
    "free-form": 1,
    "mixed": WIDTH,  # the largest of them
}
PURE = [pattern for pattern in PATTERNS if pattern != "mixed"]


def holes(pattern: str, ratio: float | tuple[float, float] = 0.3, count: int = 64, seed: int = 0) -> Tensor:
    """(count, H, W) bool, True = hidden."""
    return known_masks(pattern, ratio, HEIGHT, WIDTH, seed, torch.arange(count))[:, 0] == 0


def test_masks_are_zeros_and_ones_of_the_promised_shape() -> None:
    for pattern in PATTERNS:
        masks = known_masks(pattern, (0.1, 0.6), HEIGHT, WIDTH, 0, torch.arange(5))
        assert masks.shape == (5, 1, HEIGHT, WIDTH) and masks.dtype == torch.float32
        assert masks.unique().tolist() == [0.0, 1.0]


def test_any_split_and_order_of_a_batch_gives_the_same_masks() -> None:
    for pattern, ratio in itertools.product(PATTERNS, [0.4, (0.1, 0.7)]):

        def masks(positions: Tensor) -> Tensor:
            return known_masks(pattern, ratio, HEIGHT, WIDTH, 7, positions)

        positions = torch.tensor([3, 0, 2**40, 11, 5, 3, 8])
        whole = masks(positions)
        assert torch.equal(whole[0], whole[5])
        for size in (1, 3):
            assert torch.equal(torch.cat([masks(part) for part in positions.split(size)]), whole)
        order = torch.tensor([6, 2, 0, 5, 1, 3, 4])
        assert torch.equal(masks(positions[order]), whole[order])


def test_positions_and_seeds_have_holes_of_their_own() -> None:
    for pattern in PATTERNS:
        first, other = holes(pattern, (0.2, 0.6), seed=1), holes(pattern, (0.2, 0.6), seed=2)
        same = (first == other).flatten(1).all(dim=1).float().mean()
        assert same < 0.1  # `half` has few forms
        assert len(first.flatten(1).unique(dim=0)) > 30


def test_the_share_is_the_asked_one_up_to_a_unit() -> None:
    for pattern, ratio in itertools.product(PATTERNS, [0.02, 0.25, 0.5, 0.9]):
        asked = round(ratio * HEIGHT * WIDTH)
        excess = holes(pattern, ratio, 500).flatten(1).sum(dim=1) - asked
        assert int(excess.min()) >= 0 and int(excess.max()) < UNITS[pattern]


def test_a_pair_is_a_uniform_share() -> None:
    for pattern in PATTERNS:
        low, high, count = 0.2, 0.6, 2000
        share = holes(pattern, (low, high), count).float().mean(dim=(1, 2)).sort().values
        uniform = low + (high - low) * (torch.arange(count) + 0.5) / count
        # Kolmogorov's distance of 2000 draws is below 0.04 (p = 0.003); the share is up to a unit larger
        unit = UNITS[pattern] / (HEIGHT * WIDTH)
        assert float((share - uniform).min()) > -0.04 * (high - low) - 1 / (HEIGHT * WIDTH)
        assert float((share - uniform).max()) < 0.04 * (high - low) + unit
        assert float(share.min()) >= low - 1 / (HEIGHT * WIDTH) and float(share.max()) <= high + unit


def test_masks_are_made_on_the_device_of_the_positions() -> None:
    for pattern in PATTERNS:
        masks = known_masks(
            pattern, 0.3, HEIGHT, WIDTH, 0, torch.arange(3, device="meta")
        )  # refuses any other device's tensors
        assert masks.device.type == "meta" and masks.shape == (3, 1, HEIGHT, WIDTH)


def test_mixed_holes_are_of_each_pattern_equally_often() -> None:
    mixed = holes("mixed", (0.2, 0.6), 2000)
    same = torch.stack([(mixed == holes(pattern, (0.2, 0.6), 2000)).flatten(1).all(dim=1) for pattern in PURE])
    assert same.any(dim=0).all()
    assert float((same.float().mean(dim=1) - 1 / len(PURE)).abs().max()) < 0.04  # 4 standard errors


def test_laws_differ() -> None:
    for one, other in itertools.combinations(PURE, 2):
        assert float((holes(one) == holes(other)).flatten(1).all(dim=1).float().mean()) < 0.05


def test_every_pixel_is_hidden_equally_often_where_the_law_is_homogeneous() -> None:
    for pattern in [pattern for pattern in PURE if pattern not in ("box", "free-form")]:
        often = holes(pattern, 0.5, 4000).float().mean(dim=0)
        quarters = often.unfold(0, HEIGHT // 2, HEIGHT // 2).unfold(1, WIDTH // 2, WIDTH // 2).mean(dim=(2, 3))
        assert float((quarters - often.mean()).abs().max()) < 0.02


def test_a_hole_of_squares_is_a_union_of_squares() -> None:
    block = np.ones((SQUARE, SQUARE))
    for hole in holes("squares", 0.4, 20).numpy():
        padded = np.pad(hole, SQUARE, constant_values=True)  # the border cuts squares
        assert np.array_equal(ndimage.binary_opening(padded, block), padded)
        assert not np.array_equal(ndimage.binary_opening(padded, np.ones((SQUARE + 1,) * 2)), padded)


def test_a_box_is_one_rectangle_inside_the_image() -> None:
    for ratio in [0.05, 0.3, 0.8]:
        sides = []
        for hole in holes("box", ratio, 100).numpy():
            rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
            assert hole.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            sides.append(((np.ptp(rows) + 1) / HEIGHT, (np.ptp(columns) + 1) / WIDTH))
        aspect = np.divide(*np.transpose(sides))
        assert aspect.min() > 0.3 and aspect.max() < 3 and aspect.std() > 0.05


def test_a_half_lies_on_each_of_the_four_sides() -> None:
    seen = set()
    for hole in holes("half", 0.5, 50).numpy():
        sides = [hole[: HEIGHT // 2], hole[HEIGHT // 2 :], hole[:, : WIDTH // 2], hole[:, WIDTH // 2 :]]
        (side,) = [index for index, part in enumerate(sides) if part.all()]
        assert hole.sum() == HEIGHT * WIDTH // 2
        seen.add(side)
    assert seen == {0, 1, 2, 3}


def test_a_checkerboard_fills_one_colour_before_the_other() -> None:
    colour = torch.arange(8)[:, None].add(torch.arange(8)).remainder(2).bool()
    height, width = HEIGHT // 8, WIDTH // 8

    def cells(ratio: float) -> Tensor:
        tiles = holes("checkerboard", ratio).reshape(-1, 8, height, 8, width).transpose(2, 3).flatten(3)
        assert torch.equal(tiles.all(dim=3), tiles.any(dim=3))
        return tiles.all(dim=3)  # (B, 8, 8)

    few, half, many = cells(0.25), cells(0.5), cells(0.75)
    assert all(torch.equal(board, colour) or torch.equal(board, ~colour) for board in half)
    assert half[:, 0, 0].unique().tolist() == [False, True]
    assert (few <= half).all() and (half <= many).all()
    assert few.sum(dim=(1, 2)).unique().tolist() == [16] and many.sum(dim=(1, 2)).unique().tolist() == [48]


def test_a_free_form_hole_is_a_few_connected_strokes() -> None:
    for hole in holes("free-form", 0.3, 50).numpy():
        _, parts = ndimage.label(hole, np.ones((3, 3)))
        assert parts <= 5  # three strokes; the thinnest may break
        filled = hole.sum() / np.prod([np.ptp(np.flatnonzero(hole.any(axis=axis))) + 1 for axis in (0, 1)])
        assert filled < 0.9  # no rectangle


def test_strokes_reflect_at_the_sides() -> None:
    """A stroke that left the image would leave its brush along the border, which is then hidden in half of the holes.

    Reflected strokes hide 0.34 of it, with a standard error below 0.02.
    """
    hole = holes("free-form", 0.6, 300)
    border = torch.cat([hole[:, [0, -1]].flatten(1), hole[:, :, [0, -1]].flatten(1)], dim=1)
    assert float(border.float().mean()) < 0.4


def test_small_and_uneven_images_have_holes() -> None:
    for pattern, (height, width) in itertools.product(PATTERNS, [(1, 9), (8, 8), (13, 7)]):
        share = 1 - known_masks(pattern, 0.5, height, width, 0, torch.arange(20)).mean(dim=(1, 2, 3))
        assert float(share.min()) >= 0.4 and float(share.max()) <= 1


def test_what_cannot_be_used_is_named() -> None:
    with refused("pattern", "ring"):
        known_masks("ring", 0.5, 8, 8, 0, torch.arange(2))
    for ratio in (0.0, 1.0, -0.1, math.nan, (0.5, 0.2), (0.0, 0.5), (0.5, 1.0), (0.1, 0.2, 0.3), [0.5]):
        with refused("ratio", ratio):
            known_masks("box", ratio, 8, 8, 0, torch.arange(2))
