"""Occluded shapes hide what they say and change nothing else; the rule for whole masks accepts real ones only."""

from __future__ import annotations

import numpy as np
import torch
from refusals import refused
from torch import Tensor

from mmdiff.data import open_splits
from mmdiff.data.shapes.image_sets import load
from mmdiff.data.shapes.readers import whole_masks
from mmdiff.data.shapes.render import OCCLUDER, Shapes

COUNT = 300


def rows(**occlusion: object) -> Shapes:
    return load(rows=COUNT, validation_rows=1, occlusion=occlusion)["train"]


def column(of: Shapes, name: str) -> np.ndarray:
    return np.stack([np.asarray(of.make(row, [name])[name]) for row in range(COUNT)])


def test_only_the_image_changes_and_by_what_the_column_says() -> None:
    plain, hidden = load(rows=COUNT, validation_rows=1)["train"], rows(share=0.5)
    for name in ("mask", "label", "embedding", "caption"):
        assert (column(plain, name) == column(hidden, name)).all()
    assert (column(plain, "image") == column(rows(share=0.0), "image")).all()
    before, after, share = column(plain, "image"), column(hidden, "image"), column(hidden, "hidden")
    changed = (before != after).any(axis=3)
    assert (after[changed] == OCCLUDER).all()
    assert abs((changed.any(axis=(1, 2))).mean() - 0.5) < 4 * 0.5 / np.sqrt(COUNT)
    objects = column(plain, "mask") > 0
    found = (changed & objects).sum(axis=(1, 2)) / objects.sum(axis=(1, 2))
    assert np.abs(found - share).max() < 0.1  # pixels at the border count in part
    part = share[changed.any(axis=(1, 2))]
    assert abs(part.mean() - 0.5) < 4 * 0.29 / np.sqrt(len(part)) and part.min() < 0.1 and part.max() > 0.9


def test_a_range_of_hidden_parts_is_kept_to_a_pixel() -> None:
    part = column(rows(share=1.0, hidden=[0.9, 1.0]), "hidden")
    assert part.min() > 0.88 and part.max() <= 1.0
    assert (column(rows(share=1.0, hidden=[1.0, 1.0]), "hidden") > 0.98).all()
    assert (column(rows(share=1.0, hidden=[0.0, 0.0]), "hidden") == 0).all()


def test_a_mask_is_whole_if_it_is_one_object_of_one_class_with_a_shape() -> None:
    masks = torch.from_numpy(column(rows(), "mask").astype(np.int64))
    assert whole_masks(masks).all()

    def spoiled(change: str) -> Tensor:
        worse = masks.clone()
        for one in worse:
            lines = (one > 0).any(dim=1).nonzero().flatten().tolist()
            middle = lines[len(lines) // 2]
            if change == "nothing":
                one.zero_()
            elif change == "two classes":
                one[:middle][one[:middle] > 0] = one.max() % 6 + 1
            elif change == "two pieces":
                one[(lines[0] + 16) % 32 :: 32, ::16] = one.max()
            elif change == "half":
                one[middle:] = 0
            else:
                one.copy_(torch.where(torch.rand(one.shape, generator=noise) < 0.5, one, 0))
        return worse

    noise = torch.Generator().manual_seed(0)
    # the upper half of a triangle is a triangle
    for change, most in (("nothing", 0), ("two classes", 0), ("two pieces", 0.02), ("half", 0.2), ("pixels", 0)):
        assert float(whole_masks(spoiled(change)).double().mean()) <= most, change


def test_what_is_no_occlusion_is_refused() -> None:
    for key, value, occlusion in (
        ("occlusion.share", 1.5, {"share": 1.5}),
        ("occlusion.hidden", [0.9, 0.1], {"hidden": [0.9, 0.1]}),
        ("occlusion.hidden", 0.5, {"hidden": 0.5}),
        ("occlusion.angle", 3, {"angle": 3}),
        ("occlusion", 3, 3),
    ):
        with refused(key, value):
            open_splits("shapes", options={"rows": 4, "validation_rows": 1, "occlusion": occlusion})
    with refused("occlusion", {"share": 0.5}):
        load(rows=2, validation_rows=1, image_sets={}, occlusion={"share": 0.5})
