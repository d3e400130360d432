"""The handwritten digits of scikit-learn: 1 797 real images with labels, resized to 16×16.

Rows with index % 6 == 5 are the validation split (1 498 training rows, 299 validation rows).
"""

from __future__ import annotations

import functools

import datasets
import numpy as np
from PIL import Image

SIZE = 16
HOLDOUT = 6


@functools.cache
def load() -> datasets.DatasetDict:
    """{"train", "validation"} with columns image (grey, 16×16) and label (0–9); made once per process."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 8×8, 17 grey levels
    images = [Image.fromarray(p).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for p in pixels]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(k) for k in range(10)])}
    )
    held_out = np.arange(len(images)) % HOLDOUT == HOLDOUT - 1
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"image": [images[i] for i in rows], "label": digits.target[rows].tolist()}, features=features
            )
            for split, rows in (("train", np.flatnonzero(~held_out)), ("validation", np.flatnonzero(held_out)))
        }
    )
