"""Preprocessed photos of sets: each once and without padding, to the bits that the reader gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmdiff.benchmarks.fusion.vlm import Pixels
from mmdiff.vlm import Reader, VisionLanguageModel
from mmdiff.vlm.small import Sizes, make_small


def test_photos_of_some_sets_are_those_of_the_reader(tmp_path: Path) -> None:
    make_small(
        tmp_path / "model", "blip-2", ["what ?"], Sizes(image=16, patch=8, width=16, layers=1, heads=2, queries=2)
    )
    reader = Reader(VisionLanguageModel.from_pretrained(tmp_path / "model"))
    rng = np.random.default_rng(0)
    sets = [[Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)) for _ in range(n)] for n in (3, 1, 4, 2)]
    pixels = Pixels(reader, sets)
    assert len(pixels.flat) == 10
    for rows in ([0, 1, 2, 3], [3, 1], [1]):
        whole = reader([sets[row] for row in rows], ["what ?"] * len(rows))
        images, mask = pixels.of(torch.tensor(rows))
        assert torch.equal(mask, whole.mask) and torch.equal(images, whole.images)
