"""What a column stores, it gives back bit for bit, and plain `datasets` reads it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from PIL import Image as PILImage
from refusals import refused
from torch import Generator, Tensor

from mmdiff.data.columns import Column
from mmdiff.modalities import Image, Shape


def image(raw: PILImage.Image, channels: int, size: int = 8) -> Tensor:
    """As a modality reads it."""
    shape = Shape((channels, size, size), 1, 1)
    return Image(shape, channels, size, resize=True, head=False).preprocess(raw)


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


G = Generator().manual_seed(0)
VALUES = {
    "rgb": image(PILImage.fromarray(noise(8, 8, 3)), 3),
    "resized": image(PILImage.fromarray(noise(19, 23, 3)), 3),
    "grey": image(PILImage.fromarray(noise(8, 8)), 1),
    "16 bits": image(PILImage.fromarray(noise(8, 8, dtype=np.uint16)), 1),
    "16 bits in colour, resized": image(PILImage.fromarray(noise(19, 23, dtype=np.uint16)), 3),
    "label": torch.tensor(7),
    "number": torch.tensor(0.1),
    "vector": torch.randn(5, generator=G),
    "mask": torch.randint(0, 255, (8, 8), generator=G),
    "mask with negatives": torch.randint(-1, 300, (8, 8), generator=G),
    "ids": torch.randint(0, 2**40, (2, 3), generator=G),
    "depth": torch.randn(2, 8, 8, generator=G),
    "wide": torch.randn(2, 8, 8, generator=G, dtype=torch.float64),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_bit_for_bit(name: str) -> None:
    value = VALUES[name]
    column = Column.of(value, pixels=value.ndim == 3 and len(value) in (1, 3))
    stored = Dataset.from_list([{"c": column.store(value)}, {"c": None}], features=Features({"c": column.feature()}))
    if column.codec == "pixels":
        assert stored[0]["c"].size == (8, 8)  # a picture for any reader
    undecoded = stored.with_format("arrow")[0]["c"][0].as_py() if column.codec == "pixels" else stored[0]["c"]
    back = column.load(undecoded)
    assert torch.equal(back, value) and back.dtype == value.dtype and stored[1]["c"] is None


def test_half_precision_is_near_and_damage_is_refused() -> None:
    depth, picture = VALUES["depth"], VALUES["rgb"]
    column = Column.of(depth, half=True)
    torch.testing.assert_close(column.load(column.store(depth)), depth, rtol=1e-3, atol=1e-3)
    assert len(column.store(depth)) == 2 * depth.numel() and not Column.of(VALUES["mask"], half=True).half
    short = {"bytes": b"P6", "path": None}
    for good, stored in ((column, column.store(depth)[:-2]), (Column.of(picture, True), short)):
        with refused("value"):
            good.load(stored)
