"""MNIST-SVHN: a handwritten digit and a house number of the same class per row (Shi et al., 2019, arXiv 1911.03393).

The folder holds the published files as torchvision leaves them: `MNIST/raw/*-ubyte` and `{train,test}_32x32.mat`. The
pairs are made here, by the rule of the paper's code: within a class both sets are cut to equal length and paired at
random, several times over. Its index files are not read, so that a seed decides the pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from mmdiff.data.generated_rows import MadeRows
from mmdiff.errors import InputError
from mmdiff.randomness import fold

CLASSES = 10
_MNIST = {"train": "train", "validation": "t10k"}
_SVHN = {"train": "train", "validation": "test"}


def load(folder: str, pairs: int = 5, seed: int = 0) -> dict[str, Pairs]:
    """{"train", "validation"} with columns mnist (grey, 28×28), svhn (RGB, 32×32) and label.

    Args:
        folder: with the published files, unpacked.
        pairs: how often each image is paired, 1 … 100; the paper's code has 30.
        seed: of the pairs and of the order of rows.

    Raises:
        InputError: for a file that is not there or cannot be read, and for numbers out of range.
    """
    root = Path(folder).expanduser() if isinstance(folder, str) else Path()
    if not isinstance(folder, str) or not root.is_dir():
        raise InputError("data.options.folder", folder, "no such folder")
    for key, value, least, most in (("pairs", pairs, 1, 100), ("seed", seed, 0, 2**63 - 1)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise InputError(f"data.options.{key}", value, f"needs a whole number, {least} … {most}")
    return {split: _paired(root, split, pairs, seed) for split in ("train", "validation")}


class Pairs(MadeRows):
    """Rows of one split.

    Args:
        images: {column: (n, height, width) or (n, height, width, 3) of bytes}.
        places: {column: the row's image (rows,)}.
        labels: (rows,).
    """

    def __init__(self, images: dict[str, np.ndarray], places: dict[str, np.ndarray], labels: np.ndarray) -> None:
        label = datasets.ClassLabel(names=[str(k) for k in range(CLASSES)])
        super().__init__(len(labels), dict.fromkeys(images, datasets.Image()) | {"label": label})
        self._images, self._places, self._labels = images, places, labels

    def make(self, row: int, names: list[str]) -> dict[str, Any]:
        return {name: int(self._labels[row]) if name == "label" else self._image(name, row) for name in names}

    def _image(self, name: str, row: int) -> Image.Image:
        return Image.fromarray(self._images[name][self._places[name][row]])


def _paired(root: Path, split: str, pairs: int, seed: int) -> Pairs:
    digits, digit_labels = _read_mnist(root / "MNIST" / "raw", _MNIST[split])
    houses, house_labels = _read_svhn(root / f"{_SVHN[split]}_32x32.mat")
    random = np.random.Generator(np.random.Philox(key=[fold(seed, 0, f"mnist_svhn/{split}"), 0]))
    chosen = []
    for label in range(CLASSES):
        one, other = np.flatnonzero(digit_labels == label), np.flatnonzero(house_labels == label)
        count = min(len(one), len(other))
        for _ in range(pairs):
            chosen.append(np.stack([random.permutation(one[:count]), random.permutation(other[:count])]))
    places = random.permutation(np.concatenate(chosen, axis=1), axis=1)
    if not places.size:
        raise InputError("data.options.folder", str(root), f"has no two images of one class in the split {split}")
    both = {"mnist": places[0], "svhn": places[1]}
    return Pairs({"mnist": digits, "svhn": houses}, both, digit_labels[places[0]])


def _read_mnist(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """((n, 28, 28) bytes, labels (n,))."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    files = folder / f"{prefix}-images-idx3-ubyte", folder / f"{prefix}-labels-idx1-ubyte"
    images, labels = (_read(file, read).numpy() for file, read in zip(files, (read_image_file, read_label_file)))
    _check_lengths(files[0], len(images), len(labels))
    return images, labels


def _read_svhn(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """((n, 32, 32, 3) bytes, labels (n,)); the file's class 10 is the digit 0."""
    from scipy.io import loadmat

    tree = _read(file, loadmat)
    if not {"X", "y"} <= set(tree) or tree["X"].ndim != 4 or tree["X"].dtype != np.uint8 or tree["X"].shape[2] != 3:
        raise InputError("data.options.folder", str(file), "is no file of SVHN: needs X (32, 32, 3, n) of bytes, and y")
    images, labels = np.moveaxis(tree["X"], 3, 0), tree["y"].reshape(-1).astype(np.int64) % CLASSES
    _check_lengths(file, len(images), len(labels))
    return np.ascontiguousarray(images), labels


def _read(file: Path, read: Any) -> Any:
    if not file.is_file():
        raise InputError("data.options.folder", str(file), "no such file; unpack the published files there")
    try:
        return read(str(file))
    except Exception as error:  # the parsers raise many kinds for a damaged file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError("data.options.folder", str(file), f"cannot be read ({reason})") from error


def _check_lengths(file: Path, images: int, labels: int) -> None:
    if images != labels:
        raise InputError("data.options.folder", str(file), f"has {images} images and {labels} labels")
