"""Sources for the coherence benchmark: textured digits, and PolyMNIST and MNIST-SVHN in their published formats."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mmdiff.data import open_splits
from mmdiff.data.textured_digits import _digits
from mmdiff.errors import InputError

IMAGES = [f"image_{k}" for k in range(5)]

# ------------------------------------------------------------------------------------------------------ textured digits


def test_a_row_is_a_function_of_its_number() -> None:
    few, more = (open_splits("textured_digits", options={"rows": n, "validation_rows": 2})[0] for n in (3, 9))
    for row in range(3):
        assert few[row]["label"] == more[row]["label"]
        assert all(few[row][name].tobytes() == more[row][name].tobytes() for name in IMAGES)
    assert len({more[row][name].tobytes() for row in range(9) for name in IMAGES}) == 45
    other, _ = open_splits("textured_digits", options={"rows": 3, "validation_rows": 2, "seed": 1})
    assert other[0]["image_0"].tobytes() != few[0]["image_0"].tobytes()


def test_digits_are_brighter_than_any_ground_and_have_the_rows_class() -> None:
    """Ink is a digit of the class, and no handwriting is in both splits."""
    train, held_out = open_splits("textured_digits", options={"rows": 12, "validation_rows": 12})
    for rows, split in ((train, "train"), (held_out, "validation")):
        written = _digits(split, 16)
        for row in range(12):
            for name in IMAGES:
                pixels = np.asarray(rows[row][name], np.float64) / 255
                assert pixels.shape == (16, 16, 3)
                ink = written[rows[row]["label"]]
                bounds = [(pixels[one > 0.9].min(), pixels[one < 0.05].max()) for one in ink]
                assert any(dark < 0.4 < 0.6 < bright for bright, dark in bounds)
    one, other = (np.concatenate(_digits(split, 16)) for split in ("train", "validation"))
    assert not {digit.tobytes() for digit in one} & {digit.tobytes() for digit in other}


# ------------------------------------------------------------------------------------------------- published formats


@pytest.fixture
def polymnist(tmp_path: Path) -> Path:
    """Two rows per split; a grey that tells split, modality and row."""
    for split, number in (("train", 0), ("test", 1)):
        for modality in range(5):
            folder = tmp_path / "MMNIST" / split / f"m{modality}"
            folder.mkdir(parents=True)
            for row, label in ((10, 7), (2, 4)):
                grey = Image.new("RGB", (28, 28), (100 * number + 10 * modality + row,) * 3)
                grey.save(folder / f"{row}.{label}.png")
    return tmp_path


def test_polymnist_is_read_by_row_and_label(polymnist: Path) -> None:
    for folder in (polymnist, polymnist / "MMNIST"):
        splits = open_splits("polymnist", options={"folder": str(folder)})
        for number, rows in enumerate(splits):
            assert list(rows["label"]) == [4, 7]  # rows 2 and 10
            for row, name in ((0, 2), (1, 10)):
                greys = [rows[row][image].getpixel((0, 0))[0] for image in IMAGES]
                assert greys == [100 * number + 10 * modality + name for modality in range(5)]


@pytest.mark.parametrize(
    ("damage", "value"),
    [
        (lambda root: (root / "train" / "m3" / "2.4.png").unlink(), "m3"),
        (lambda root: (root / "test" / "m0" / "notes.txt").write_text(""), "notes.txt"),
        (lambda root: (root / "test" / "m4").rename(root / "m4"), "m4"),
        (lambda root: [path.unlink() for path in (root / "train" / "m0").iterdir()], "m0"),
    ],
)
def test_damaged_polymnist_is_one_line(damage: Any, value: str, polymnist: Path) -> None:
    damage(polymnist / "MMNIST")
    with pytest.raises(InputError, match=value) as caught:
        open_splits("polymnist", options={"folder": str(polymnist)})
    assert "data.options.folder" in str(caught.value)


def write_mnist(folder: Path, prefix: str, labels: list[int]) -> None:
    """In the idx format of Yann LeCun; the grey is the row."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None] * np.ones((1, 28, 28), np.uint8)
    head = struct.pack(">IIII", 0x803, len(labels), 28, 28)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
    head = struct.pack(">II", 0x801, len(labels))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + bytes(labels))


@pytest.fixture
def mnist_svhn(tmp_path: Path) -> Path:
    for mnist, svhn in (("train", "train"), ("t10k", "test")):
        write_mnist(tmp_path / "MNIST" / "raw", mnist, [0, 1, 1, 5, 0])
        labels = np.array([[10], [1], [10], [3]], np.uint8)  # 10 is the digit 0
        pixels = np.arange(4, dtype=np.uint8) * np.ones((32, 32, 3, 1), np.uint8)
        savemat(tmp_path / f"{svhn}_32x32.mat", {"X": pixels, "y": labels})
    return tmp_path


def test_mnist_svhn_pairs_images_of_one_class(mnist_svhn: Path) -> None:
    options = {"folder": str(mnist_svhn), "pairs": 3}
    train, _ = open_splits("mnist_svhn", options=options)
    assert len(train) == 3 * (2 + 1)  # two pairs of zeros, one of ones
    pairs = [(row["mnist"].getpixel((0, 0)), row["svhn"].getpixel((0, 0))[0], row["label"]) for row in train]
    assert all((one, label) in {(0, 0), (4, 0), (1, 1)} for one, _, label in pairs)
    assert all((other, label) in {(0, 0), (2, 0), (1, 1)} for _, other, label in pairs)
    for column, times in ((0, 3), (1, 3)):
        places = [(pair[column], pair[2]) for pair in pairs]
        assert all(places.count(place) == times for place in places)
    again, _ = open_splits("mnist_svhn", options=options)
    other, _ = open_splits("mnist_svhn", options=options | {"seed": 1})

    def order(rows: Any) -> list[Any]:
        return [(row["mnist"].tobytes(), row["svhn"].tobytes()) for row in rows]

    assert order(again) == order(train) != order(other)


@pytest.mark.parametrize(
    ("damage", "value"),
    [
        (lambda root: (root / "train_32x32.mat").unlink(), "train_32x32.mat"),
        (lambda root: (root / "test_32x32.mat").write_bytes(b"no such file"), "test_32x32.mat"),
        (lambda root: savemat(root / "test_32x32.mat", {"y": [[1]]}), "test_32x32.mat"),
        (lambda root: (root / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(b"\0\0"), "t10k-images"),
        (lambda root: write_mnist(root / "MNIST" / "raw", "train", [7, 8]), "train"),
    ],
)
def test_damaged_mnist_svhn_is_one_line(damage: Any, value: str, mnist_svhn: Path) -> None:
    damage(mnist_svhn)
    with pytest.raises(InputError, match=value) as caught:
        open_splits("mnist_svhn", options={"folder": str(mnist_svhn)})
    assert "data.options.folder" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "options", "key"),
    [
        ("textured_digits", {"rows": 0}, "data.options.rows"),
        ("textured_digits", {"size": 4}, "data.options.size"),
        ("textured_digits", {"size": 16.5}, "data.options.size"),
        ("textured_digits", {"seed": True}, "data.options.seed"),
        ("textured_digits", {"row": 3}, "data.options.row"),
        ("polymnist", {"folder": "nowhere"}, "data.options.folder"),
        ("polymnist", {"folder": 3}, "data.options.folder"),
        ("mnist_svhn", {"folder": "nowhere"}, "data.options.folder"),
        ("mnist_svhn", {"folder": ".", "pairs": 0}, "data.options.pairs"),
        ("mnist_svhn", {}, "data.options"),
    ],
)
def test_bad_options_are_one_line(source: str, options: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        open_splits(source, options=options)
    assert key in str(caught.value) and "\n" not in str(caught.value)
