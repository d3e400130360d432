"""Rows of a source as rows of shards: values as modalities read them, and what a frozen network makes of the anchor."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mmdiff.config import Config
from mmdiff.data import Batch, Rows, Table
from mmdiff.data.columns import Column
from mmdiff.data.encoded import latents_of
from mmdiff.errors import InputError, at
from mmdiff.modalities import Anchor, Condition, Shape, find_modality
from mmdiff.training.disk import whole

GROUP = 2**24  # bytes of a row group, which streaming reads at once


class Request(NamedTuple):
    """What to encode, and how.

    Args:
        config: of an experiment.
        out: the folder.
        rows_per_shard: rows of every file but the last of a split.
        dtype: "float32", or "float16" for arrays of floats, latents among them.
        images: whether the anchor's images are written beside its latents.
        batch_size: images that the autoencoder gets at once; by default as many as in training, so that a training on
            the folder has the same bits.
        progress: show a bar.
    """

    config: Config
    out: Path
    rows_per_shard: int = 1024
    dtype: str = "float32"
    images: bool = True
    batch_size: int | None = None
    progress: bool = True


class Encoder:
    """Rows of a source as rows of shards.

    Args:
        config: resolved.
        request: how to write.
    """

    def __init__(self, config: Config, request: Request) -> None:
        if config.data.one_of:
            raise InputError("data.one_of", config.data.one_of, "draws at every visit, and a row is encoded once")
        self.config, self.request = config, request
        self.modalities = _modalities(config)
        self.anchor: Condition = self.modalities[config.anchor]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = request.batch_size or config.train.batch_size // config.train.accumulate
        half = request.dtype == "float16"
        self.columns: dict[str, Column] = {}
        for name, modality in self.modalities.items():
            with at(f"modalities.{name}"):
                self.columns[name] = Column.of(modality.placeholder(), modality.are_images, half)
        if (latents := self.latents(self.anchor.placeholder()[None])) is not None:
            self.columns[latents_of(config.anchor)] = Column.of(latents[0].float(), half=half)
            if not request.images:
                del self.columns[config.anchor]
        elif not request.images:
            raise InputError("--no-images", config.anchor, "has no latents; its images are all there is")

    @torch.no_grad()
    def latents(self, value: Tensor) -> Tensor | None:
        """What the anchor's frozen network makes of values, in a batch of the size of training's; None without one."""
        if not isinstance(self.anchor, Anchor):
            return None
        with at(f"modalities.{self.config.anchor}"):
            parts = [self.anchor.frozen_encoding(self._filled(part)) for part in value.split(self.batch_size)]
        if parts[0] is None:
            return None
        return torch.cat([latent[: len(part)].cpu() for latent, part in zip(parts, value.split(self.batch_size))])

    def _filled(self, value: Tensor) -> Tensor:
        """Up to a whole batch: the bits of a network's output may depend on its size."""
        fill = self.anchor.placeholder().expand(self.batch_size - len(value), *value.shape[1:])
        return torch.cat([value, fill]).to(self.device)

    def table(self, rows: Rows) -> Table:
        """Rows as values, without holes and hidden values, which training draws itself."""
        data = self.config.data
        return Table(
            rows,
            columns={name: self.config.column(name) for name in self.modalities},
            preprocess={name: modality.preprocess for name, modality in self.modalities.items()},
            placeholders={name: modality.placeholder() for name, modality in self.modalities.items()},
            is_missing={name: modality.is_missing for name, modality in self.modalities.items()},
            cache_mib=0.0,
            source=data.source,
            on_error=data.on_error,
            max_errors=data.max_errors,
        )

    def stored(self, batch: Batch) -> dict[str, list[Any]]:
        """{column: what is written of each row}; None where a value is missing."""
        values, anchor = dict(batch.values), self.config.anchor
        if (latents := self.latents(values[anchor])) is not None:
            values[latents_of(anchor)] = latents.float()
        cells: dict[str, list[Any]] = {}
        for name, column in self.columns.items():
            with at(f"modalities.{name}"):
                present = batch.present[name.partition("/")[0]].tolist()
                cells[name] = [column.store(v) if there else None for v, there in zip(values[name], present)]
        return cells

    def write(self, cells: dict[str, list[Any]], file: Path) -> None:
        """A shard, whole or not at all."""
        features = datasets.Features({name: column.feature() for name, column in self.columns.items()})
        row_bytes = sum(column.row_bytes for column in self.columns.values())
        table = pa.table(cells, schema=features.arrow_schema)
        with whole(file) as partial:
            pq.write_table(table, partial, compression="zstd", row_group_size=max(1, GROUP // row_bytes))


def _modalities(config: Config) -> dict[str, Condition]:
    """The modalities that read a column, with heads of one feature: nothing is predicted."""
    anchor = config.modalities[config.anchor]
    with at(f"modalities.{config.anchor}"):
        kind = find_modality(anchor.kind, "kind")
        space = kind.diffusion_space(**anchor.settings()) if issubclass(kind, Anchor) else None
    if space is None:
        raise InputError("anchor", config.anchor, "cannot be diffused itself; choose an image modality")
    modalities: dict[str, Condition] = {}
    for name, entry in sorted(config.modalities.items()):
        if name not in config.data.masking:
            head = {"head": False} if name == config.anchor else {}
            with at(f"modalities.{name}"):
                modalities[name] = find_modality(entry.kind, "kind")(Shape(space, 8, 8), **entry.settings(), **head)
    return modalities
