"""The embedded digits are scikit-learn's own, split by index and enlarged by PIL's bicubic filter."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from mmdiff.data import open_splits

IS_HELD_OUT = np.arange(1797) % 6 == 5


@pytest.fixture(scope="module")
def splits() -> dict[str, datasets.Dataset]:
    return dict(zip(("train", "validation"), open_splits("digits"), strict=True))


@pytest.mark.parametrize(("split", "count"), [("train", 1498), ("validation", 299)])
def test_rows_are_the_originals_in_order(splits: dict[str, datasets.Dataset], split: str, count: int) -> None:
    rows = splits[split]
    assert len(rows) == count
    original = load_digits()
    own = IS_HELD_OUT if split == "validation" else ~IS_HELD_OUT
    assert list(rows["label"]) == original.target[own].tolist()
    grey = [np.round(image / 16 * 255).astype(np.uint8) for image in original.images[own]]
    expected = np.stack([np.asarray(Image.fromarray(g, "L").resize((16, 16), Image.Resampling.BICUBIC)) for g in grey])
    found = np.stack([np.asarray(image) for image in rows["image"]])
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)


def test_the_images_are_grey_and_use_the_whole_range(splits: dict[str, datasets.Dataset]) -> None:
    image = splits["train"][0]["image"]
    assert (image.mode, image.size) == ("L", (16, 16))
    pixels = np.stack([np.asarray(image) for image in splits["validation"]["image"]])
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_labels_have_ten_names(splits: dict[str, datasets.Dataset]) -> None:
    assert splits["train"].features["label"].names == [str(k) for k in range(10)]


def test_no_image_lies_in_both_splits(splits: dict[str, datasets.Dataset]) -> None:
    train, held_out = ({np.asarray(image).tobytes() for image in splits[name]["image"]} for name in splits)
    assert not train & held_out
