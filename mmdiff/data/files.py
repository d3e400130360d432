"""Files inside rows: images stay as they are stored until a modality reads them, which can say what is wrong."""

from __future__ import annotations

import copy
from typing import Any

import datasets


def undecoded(rows: Any) -> Any:
    """The same rows, images as {"bytes": …, "path": …}: `datasets` decodes on access and names no row on failure."""
    if not isinstance(rows, datasets.Dataset):
        return rows
    info = rows.info.copy()
    info.features = copy.deepcopy(rows.features)
    for feature in info.features.values():
        _switch_off(feature)
    return datasets.Dataset(rows.data, info, rows.split, rows._indices, f"{rows._fingerprint}u")


def _switch_off(feature: Any) -> None:
    if isinstance(feature, datasets.Image):
        feature.decode = False
    elif isinstance(feature, datasets.List | datasets.LargeList):
        _switch_off(feature.feature)
