"""Rows become batches of values, with a `present` mask for each modality."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mmdiff.data.masking import known_masks
from mmdiff.data.sampler import Visit
from mmdiff.errors import InputError, at
from mmdiff.randomness import uniform

ROW = "__row__"


class Rows(Protocol):
    """The part of a Hugging Face data set that is used."""

    column_names: list[str]
    features: Any

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def select(self, indices: list[int]) -> Rows: ...

    def select_columns(self, names: list[str]) -> Rows: ...


class Holes(NamedTuple):
    """How a masked image is made from another modality's image.

    ``law`` and ``ratio`` as in `mmdiff.data.masking.known_masks`; ``seed`` of the holes.
    """

    source: str
    law: str
    ratio: tuple[float, float]
    seed: int


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


class Table(torch.utils.data.Dataset):
    """Rows as batches of values.

    Args:
        rows: a data set.
        columns: {modality: column}.
        preprocess: {modality: raw value -> tensor}.
        placeholders: {modality: the tensor that stands for a missing value}.
        holes: {masked image: how it is made}; its value is the source's with holes, and the mask of known pixels.
        missing: {modality: share of rows whose value is hidden}, the same rows always.
        seed: of the hidden values.
        cache_mib: keep all values in memory where they fit into this many MiB, so that nothing is decoded twice.
    """

    def __init__(
        self,
        rows: Rows,
        columns: Mapping[str, str],
        preprocess: Mapping[str, Callable[[object], Tensor]],
        placeholders: Mapping[str, Tensor],
        holes: Mapping[str, Holes] | None = None,
        missing: Mapping[str, float] | None = None,
        seed: int = 0,
        cache_mib: float = 512.0,
    ) -> None:
        for name, column in columns.items():
            if column not in rows.column_names:
                raise InputError(f"data.columns.{name}", column, f"the source has {', '.join(rows.column_names)}")
        self.rows = rows.select_columns(sorted({*columns.values(), ROW} & set(rows.column_names)))
        self.columns, self.preprocess, self.placeholders = dict(columns), dict(preprocess), dict(placeholders)
        self.holes, self.missing, self.seed = dict(holes or {}), dict(missing or {}), seed
        row_bytes = sum(math.prod(placeholders[n].shape) * placeholders[n].element_size() for n in columns)
        self._cache: Batch | None = None
        if len(rows) * row_bytes <= cache_mib * 2**20:
            self._cache = self._read(range(len(rows)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return self.batch([index])

    def __getitems__(self, visits: Sequence[Visit]) -> Batch | InputError:
        """For a data loader. An unusable row travels as a value: workers turn exceptions into text."""
        try:
            return self.batch([v.row for v in visits], [v.sample for v in visits])
        except InputError as error:
            return error

    def batch(self, indices: Sequence[int], samples: Sequence[int] | None = None) -> Batch:
        """The rows of these indices, stacked.

        Args:
            indices: of the rows.
            samples: numbers that random holes are functions of; by default the indices, so that a row keeps its hole.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        if self._cache is None:
            read = self._read(indices)
        else:
            read = Batch(*({name: tensor[chosen] for name, tensor in part.items()} for part in self._cache))
        batch = self._with_holes(read, chosen if samples is None else torch.as_tensor(samples, dtype=torch.int64))
        hidden = {
            name: batch.present[name] & (uniform(self.seed, 0, f"missing/{name}", chosen) >= share)
            for name, share in self.missing.items()
        }
        return Batch(batch.values, batch.present | hidden)

    def all(self, limit: int | None = None) -> Batch:
        """The first ``limit`` rows, or all of them."""
        return self.batch(range(len(self) if limit is None else min(limit, len(self))))

    def _with_holes(self, batch: Batch, samples: Tensor) -> Batch:
        """The batch with its masked images: (B, C + 1, H, W), the last channel 1 where known."""
        values, present = dict(batch.values), dict(batch.present)
        for name, holes in self.holes.items():
            image = values[holes.source]
            known = known_masks(holes.law, holes.ratio, *image.shape[-2:], holes.seed, samples)  # (B, 1, H, W)
            values[name] = torch.cat([image * known, known], dim=1)
            present[name] = present[holes.source]
        return Batch(values, present)

    def _read(self, indices: Sequence[int]) -> Batch:
        values: dict[str, list[Tensor]] = {name: [] for name in self.columns}
        present: dict[str, list[bool]] = {name: [] for name in self.columns}
        for index in indices:
            row = self.rows[int(index)]
            for name, column in self.columns.items():
                raw, there = row.get(column), not _missing(row.get(column))
                present[name].append(there)
                values[name].append(self._value(name, raw, row.get(ROW, index)) if there else self.placeholders[name])
        return Batch(
            {name: torch.stack(items) for name, items in values.items()},
            {name: torch.tensor(mask) for name, mask in present.items()},
        )

    def _value(self, name: str, raw: object, index: int) -> Tensor:
        with at(f"data.columns.{name}={self.columns[name]}, row {index}", ": "):
            return self.preprocess[name](raw)


def _missing(raw: object) -> bool:
    """None, and a set of which nothing is there."""
    return raw is None or (isinstance(raw, list) and all(item is None for item in raw))


class StandIn(torch.utils.data.Dataset):
    """Random values in place of data.

    Args:
        examples: {modality: (count, generator) -> values}.
        rows: how many there seem to be.
    """

    def __init__(self, examples: Mapping[str, Callable[[int, torch.Generator], Tensor]], rows: int = 2**20) -> None:
        self.examples, self.rows = dict(examples), rows

    def __len__(self) -> int:
        return self.rows

    def __getitems__(self, visits: Sequence[Visit]) -> Batch:
        generator = torch.Generator().manual_seed(visits[0].sample)
        values = {name: draw(len(visits), generator) for name, draw in self.examples.items()}
        return Batch(values, {name: torch.ones(len(visits), dtype=torch.bool) for name in values})
