"""Where rows come from: the embedded data sets, and any Hugging Face data set by hub name, folder or parquet files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from torch import Tensor

from mmdiff.data import digits
from mmdiff.errors import InputError

ROW = "__row__"
EMBEDDED: dict[str, Callable[[], datasets.DatasetDict]] = {"digits": digits.load}


class Batch(NamedTuple):
    """``values`` {modality: (B, …)} and ``present`` {modality: (B,) bool}; every key is always there."""

    values: dict[str, Tensor]
    present: dict[str, Tensor]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        move = {"device": device, "non_blocking": True}
        return Batch(
            {name: value.to(**move) for name, value in self.values.items()},
            {name: mask.to(**move) for name, mask in self.present.items()},
        )


def open_splits(
    source: str, split: str = "train", validation_split: str = "validation", holdout: int | None = None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The training rows and the held-out rows of a source.

    Args:
        source: an embedded set ("digits"), a hub name, a local folder, or a parquet file or glob.
        split, validation_split: names of the two splits.
        holdout: k; instead of a validation split hold out the training rows with index % k == k − 1.

    Raises:
        InputError: naming data.source, data.split or data.validation_split.
    """
    splits = _load(source)
    if split not in splits:
        raise InputError("data.split", split, f"the source has the splits {', '.join(splits)}")
    if holdout is not None:
        rows = splits[split]
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


def _load(source: str) -> datasets.DatasetDict:
    if source in EMBEDDED:
        return EMBEDDED[source]()
    try:
        if source.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=source)
        return datasets.load_dataset(source)
    except Exception as error:  # the hub client and the builders raise many kinds; the person needs one line
        local = Path(source).expanduser()
        known = (
            "" if local.exists() else f"; embedded sets: {', '.join(EMBEDDED)}; or a folder, a parquet file, a hub name"
        )
        raise InputError("data.source", source, f"cannot be opened ({type(error).__name__}: {error}){known}") from error


class Table(torch.utils.data.Dataset):
    """Rows as batches of values.

    Args:
        rows: a Hugging Face data set.
        columns: {modality: column}.
        preprocess: {modality: raw value -> tensor}.
        placeholders: {modality: the tensor that stands for a missing value}.
        cache_mib: keep all values in memory where they fit into this many MiB, so that nothing is decoded twice.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        columns: Mapping[str, str],
        preprocess: Mapping[str, Callable[[object], Tensor]],
        placeholders: Mapping[str, Tensor],
        cache_mib: float = 512.0,
    ) -> None:
        for name, column in columns.items():
            if column not in rows.column_names:
                raise InputError(f"data.columns.{name}", column, f"the source has {', '.join(rows.column_names)}")
        self.rows = rows.select_columns(sorted({*columns.values(), ROW} & set(rows.column_names)))
        self.columns, self.preprocess, self.placeholders = dict(columns), dict(preprocess), dict(placeholders)
        row_bytes = sum(math.prod(p.shape) * p.element_size() for p in placeholders.values())
        self._cache: Batch | None = None
        if len(rows) * row_bytes <= cache_mib * 2**20:
            self._cache = self._read(range(len(rows)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return self.batch([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch | InputError:
        """For a data loader. An unusable row travels as a value: workers turn exceptions into text."""
        try:
            return self.batch(indices)
        except InputError as error:
            return error

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows of these indices, stacked."""
        if self._cache is None:
            return self._read(indices)
        chosen = torch.as_tensor(indices)
        return Batch(
            {name: value[chosen] for name, value in self._cache.values.items()},
            {name: mask[chosen] for name, mask in self._cache.present.items()},
        )

    def all(self, limit: int | None = None) -> Batch:
        """The first ``limit`` rows, or all of them."""
        return self.batch(range(len(self) if limit is None else min(limit, len(self))))

    def _read(self, indices: Sequence[int]) -> Batch:
        values: dict[str, list[Tensor]] = {name: [] for name in self.columns}
        present: dict[str, list[bool]] = {name: [] for name in self.columns}
        for index in indices:
            row = self.rows[int(index)]
            for name, column in self.columns.items():
                raw = row[column]
                present[name].append(raw is not None)
                values[name].append(
                    self.placeholders[name] if raw is None else self._value(name, raw, row.get(ROW, index))
                )
        return Batch(
            {name: torch.stack(items) for name, items in values.items()},
            {name: torch.tensor(mask) for name, mask in present.items()},
        )

    def _value(self, name: str, raw: object, index: int) -> Tensor:
        try:
            return self.preprocess[name](raw)
        except InputError as error:
            key = f"data.columns.{name}={self.columns[name]}, row {index}: {error.key}"
            raise InputError(key, error.value, error.remedy) from None
