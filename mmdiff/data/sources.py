"""Where rows come from: the embedded data sets, and any Hugging Face data set by hub name, folder or parquet files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets

from mmdiff.data import abo, bags, digits, shape_bags
from mmdiff.data.table import ROW, Rows
from mmdiff.errors import InputError


def _bags(source: str, **options: Any) -> Mapping[str, Rows]:
    """Any other source as bags of its views, see `mmdiff.data.bags.load`."""
    return bags.load(_load(source, {}), **options)


EMBEDDED: dict[str, Callable[..., Mapping[str, Rows]]] = {
    "abo": abo.load,
    "bags": _bags,
    "digits": digits.load,
    "shapes": shape_bags.load,
}


def open_splits(
    source: str,
    split: str = "train",
    validation_split: str = "validation",
    holdout: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Rows, Rows]:
    """The training rows and the held-out rows of a source.

    Args:
        source: a key of `EMBEDDED`, a hub name, a local folder, or a parquet file or glob.
        split, validation_split: names of the two splits.
        holdout: k; instead of a validation split hold out the training rows with index % k == k − 1.
        options: arguments of the embedded set, or of `datasets.load_dataset`.

    Raises:
        InputError: naming data.source, data.options, data.split or data.validation_split.
    """
    splits = _load(source, dict(options or {}))
    if split not in splits:
        raise InputError("data.split", split, f"the source has the splits {', '.join(splits)}")
    if holdout is not None:
        rows = splits[split]
        if isinstance(rows, datasets.Dataset):
            if ROW in rows.column_names:
                raise InputError("data.source", source, f"has a column {ROW}, which mmdiff uses itself; rename it")
            rows = rows.add_column(ROW, list(range(len(rows))))  # errors name a row by its number in the source
        held_out = [i for i in range(len(rows)) if i % holdout == holdout - 1]
        kept = [i for i in range(len(rows)) if i % holdout != holdout - 1]
        return rows.select(kept), rows.select(held_out)
    if validation_split not in splits:
        raise InputError(
            "data.validation_split",
            validation_split,
            f"the source has the splits {', '.join(splits)}; name one, or hold out every 10th row with data.holdout=10",
        )
    return splits[split], splits[validation_split]


def _load(source: str, options: dict[str, Any]) -> Mapping[str, Rows]:
    if source in EMBEDDED:
        try:
            return EMBEDDED[source](**options)
        except TypeError as error:
            raise InputError("data.options", options, f"do not fit {source}: {error}") from None
    try:
        if source.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=source, **options)
        return datasets.load_dataset(source, **options)
    except Exception as error:  # the hub client and the builders raise many kinds; the person needs one line
        local = Path(source).expanduser()
        known = (
            "" if local.exists() else f"; embedded sets: {', '.join(EMBEDDED)}; or a folder, a parquet file, a hub name"
        )
        raise InputError("data.source", source, f"cannot be opened ({type(error).__name__}: {error}){known}") from error
