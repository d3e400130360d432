"""Rows become batches of values with a `present` mask for each modality."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mmdiff.data.augment import Augment
from mmdiff.data.buckets import BucketOrder, Buckets, Reader
from mmdiff.data.choice import OneOf
from mmdiff.data.files import ROW
from mmdiff.data.masking import known_masks
from mmdiff.data.order import Order, Visit
from mmdiff.errors import InputError, at
from mmdiff.randomness import uniform

logger = logging.getLogger(__name__)


class Rows(Protocol):
    """The part of the interface of `datasets.Dataset` that is used."""

    column_names: list[str]
    features: Any

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def select(self, indices: list[int]) -> Rows: ...

    def select_columns(self, names: list[str]) -> Rows: ...


class Holes(NamedTuple):
    """How a masked image is made from the image of the modality ``source``.

    ``pattern``, ``ratio`` and ``seed`` as of `mmdiff.data.masking.known_masks`.
    """

    source: str
    pattern: str
    ratio: tuple[float, float]
    seed: int


class Batch(NamedTuple):
    """``values`` {modality: (B, …)} and ``present`` {modality: (B,) bool}, with every key in every batch; ``unusable``,
    one error line for each skipped value."""

    values: dict[str, Tensor]
    present: dict[str, Tensor]
    unusable: tuple[str, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        move = {"device": device, "non_blocking": True}
        return Batch(
            {name: value.to(**move) for name, value in self.values.items()},
            {name: mask.to(**move) for name, mask in self.present.items()},
            self.unusable,
        )

    @classmethod
    def joined(cls, pieces: Sequence[Batch]) -> Batch:
        """Pieces of a batch, one after the other."""
        if len(pieces) == 1:
            return pieces[0]
        values, present, unusable = zip(*pieces, strict=True)
        whole = ({name: torch.cat([piece[name] for piece in part]) for name in part[0]} for part in (values, present))
        return cls(*whole, tuple(line for lines in unusable for line in lines))


class Unusable:
    """Counts skipped values, each once, and stops the run when they are too many.

    Args:
        rows: number of rows of the data set.
        share: largest share of rows with such a value.
    """

    def __init__(self, rows: int, share: float) -> None:
        self.rows, self.share, self.lines = rows, share, dict[str, None]()

    def add(self, lines: Sequence[str]) -> None:
        """Count the lines and log new ones.

        Raises:
            InputError: when more than the share are skipped.
        """
        new = [line for line in lines if line not in self.lines]
        self.lines |= dict.fromkeys(new)
        first = "; ".join(new[:3]) + ("; …" if len(new) > 3 else "")
        if len(self.lines) > self.share * self.rows:
            count = f"{len(self.lines)} unusable values in {self.rows} rows"
            remedy = f"are more than data.max_errors = {self.share:g}; mend them, or raise it: {first}"
            raise InputError("data.on_error", count, remedy, everywhere=False)
        if new:
            logger.warning("%d of %d rows have a value that counts as absent: %s", len(self.lines), self.rows, first)


class Table(torch.utils.data.Dataset):
    """Rows as batches of values.

    Args:
        rows: a data set.
        columns: {modality: column}.
        preprocess: {modality: raw value -> tensor}.
        placeholders: {modality: the tensor in place of a missing value}.
        holes: {masked image: how it is made}; its value is the image with holes and the mask of known pixels.
        missing: {modality: share of rows whose value is hidden}, always the same rows.
        one_of: modalities whose column holds lists; training draws an item at every visit, elsewhere the first counts.
        seed: of the hidden values.
        cache_mib: keep all values in memory if they fit into this many MiB, so that nothing is decoded twice.
        source: of the rows, for errors.
        on_error: "raise", or "skip": a value that cannot be used counts as absent.
        max_errors: largest share of rows with such a value; more stop the run.
        is_missing: {modality: whether a raw value means missing}; None always does.
        augment: changes rows when training visits them.
        buckets: the sizes at which training reads rows; nothing is cached then.
    """

    def __init__(
        self,
        rows: Rows,
        columns: Mapping[str, str],
        preprocess: Mapping[str, Callable[[object], Tensor]],
        placeholders: Mapping[str, Tensor],
        holes: Mapping[str, Holes] | None = None,
        missing: Mapping[str, float] | None = None,
        one_of: Collection[str] = (),
        seed: int = 0,
        cache_mib: float = 512.0,
        source: str | Sequence[str] = "",
        on_error: str = "raise",
        max_errors: float = 0.01,
        is_missing: Mapping[str, Callable[[object], bool]] | None = None,
        augment: Augment | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        for name, column in columns.items():
            if column not in rows.column_names:
                known = ", ".join(n for n in rows.column_names if n != ROW)
                raise InputError(f"data.columns.{name}", column, f"the source has {known}")
        self.rows = rows.select_columns(sorted({*columns.values(), ROW} & set(rows.column_names)))
        self.columns, self.reader = dict(columns), Reader(dict(preprocess), dict(placeholders))
        self.is_missing, self.augment, self.buckets = dict(is_missing or {}), augment, buckets
        self.holes, self.missing, self.seed = dict(holes or {}), dict(missing or {}), seed
        self.one_of, self.source = OneOf(one_of, self.is_missing, seed), origin(source, rows)
        self.skip, self.unusable = on_error == "skip", Unusable(len(rows), max_errors)
        row_bytes = sum(math.prod(placeholders[n].shape) * placeholders[n].element_size() for n in columns)
        self._cache: Batch | None = None
        if len(rows) * row_bytes <= cache_mib * 2**20 and buckets is None and not self.one_of:
            self._cache = self._read(range(len(rows)), self.reader)
            self.unusable.add(self._cache.unusable)

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, seed: int, streams: int, batch_size: int) -> Order | BucketOrder:
        """The order in which training visits the rows; arguments as of `Order`."""
        shards = getattr(self.rows, "shards", None)  # streamed
        order = Order(shards, seed, streams, batch_size) if shards else Order(len(self), seed)
        if self.buckets is not None:
            return BucketOrder(order, self.buckets.of_rows, batch_size)
        return order

    def __getitem__(self, index: int) -> Batch:
        return self.batch([index])

    def __getitems__(self, visits: Sequence[Visit]) -> Batch | InputError:
        """For a data loader. An error is returned: worker processes would turn an exception into text."""
        try:
            return self.batch([v.row for v in visits], [v.sample for v in visits])
        except InputError as error:
            return error

    def batch(self, indices: Sequence[int], samples: Sequence[int] | None = None) -> Batch:
        """The rows of these indices, stacked.

        Args:
            indices: of the rows.
            samples: sample numbers in the run, from which holes and changes are drawn; the rows are of one bucket. By
                default they have the model's own size, stay unchanged and keep their holes.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        if self._cache is None:
            bucketed = self.buckets is not None and samples is not None
            read = self._read(indices, self.buckets.reader(indices) if bucketed else self.reader, samples)
        else:
            read = Batch(*({name: tensor[chosen] for name, tensor in part.items()} for part in self._cache[:2]))
        numbers = chosen if samples is None else torch.as_tensor(samples, dtype=torch.int64)
        if samples is not None and self.augment is not None:
            read = read._replace(values=self.augment(read.values, numbers))
        batch = self._with_holes(read, numbers)
        hidden = {
            name: batch.present[name] & (uniform(self.seed, 0, f"missing/{name}", chosen) >= share)
            for name, share in self.missing.items()
        }
        return Batch(batch.values, batch.present | hidden, batch.unusable)

    def all(self, limit: int | None = None) -> Batch:
        """The first ``limit`` rows, or all rows; skipped values are counted."""
        batch = self.batch(range(len(self) if limit is None else min(limit, len(self))))
        self.unusable.add(batch.unusable)
        return batch

    def _with_holes(self, batch: Batch, samples: Tensor) -> Batch:
        """The batch with masked images (B, C + 1, H, W); the last channel is 1 at known pixels."""
        values, present = dict(batch.values), dict(batch.present)
        for name, holes in self.holes.items():
            image = values[holes.source]
            known = known_masks(holes.pattern, holes.ratio, *image.shape[-2:], holes.seed, samples)  # (B, 1, H, W)
            values[name] = torch.cat([image * known, known], dim=1)
            present[name] = present[holes.source]
        return Batch(values, present, batch.unusable)

    def _read(self, indices: Sequence[int], reader: Reader, samples: Sequence[int] | None = None) -> Batch:
        values: dict[str, list[Tensor]] = {name: [] for name in self.columns}
        present: dict[str, list[bool]] = {name: [] for name in self.columns}
        unusable: list[str] = []
        choose = self.one_of.of(samples)
        for place, index in enumerate(indices):
            row = self._row(int(index), unusable)
            for name, column in self.columns.items():
                raw = choose(name, place, row.get(column))
                value = self._value(name, raw, row.get(ROW, index), unusable, reader)
                present[name].append(value is not None)
                values[name].append(reader.placeholders[name] if value is None else value)
        return Batch(
            {name: torch.stack(items) for name, items in values.items()},
            {name: torch.tensor(mask) for name, mask in present.items()},
            tuple(unusable),
        )

    def _row(self, index: int, unusable: list[str]) -> Mapping[str, Any]:
        """Nothing for a row that cannot be read if such rows are skipped."""
        try:
            return self.rows[index]
        except InputError as error:
            if not self.skip:
                raise
            unusable.append(str(error))
            return {}

    def _value(self, name: str, raw: object, row: int, unusable: list[str], reader: Reader) -> Tensor | None:
        """None for a missing value, and for one that cannot be used if such values are skipped."""
        if raw is None or (name in self.is_missing and self.is_missing[name](raw)):
            return None
        try:
            with at(f"data.columns.{name}={self.columns[name]}, row {row} of {self.source}", ": "):
                return reader.preprocess[name](raw)
        except InputError as error:
            if not self.skip:
                raise
            unusable.append(str(error))
            return None


def origin(source: str | Sequence[str], rows: Rows) -> str:
    """A source and the split of its rows, for errors."""
    source = source if isinstance(source, str) else ", ".join(source)
    split = getattr(rows, "split", None)
    return f"{source} ({split})" if split else source


class StandIn(torch.utils.data.Dataset):
    """Random values in place of data.

    Args:
        examples: {modality: (count, generator) -> values}.
        rows: the number of rows to report.
    """

    def __init__(self, examples: Mapping[str, Callable[[int, torch.Generator], Tensor]], rows: int = 2**20) -> None:
        self.examples, self.rows, self.unusable = dict(examples), rows, Unusable(rows, 0.0)

    def __len__(self) -> int:
        return self.rows

    def order(self, seed: int, streams: int, batch_size: int) -> Order:
        """As of `Table.order`."""
        return Order(self.rows, seed)

    def __getitems__(self, visits: Sequence[Visit]) -> Batch:
        generator = torch.Generator().manual_seed(visits[0].sample)
        values = {name: draw(len(visits), generator) for name, draw in self.examples.items()}
        return Batch(values, {name: torch.ones(len(visits), dtype=torch.bool) for name in values})
