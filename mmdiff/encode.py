"""`mmdiff encode`: what a training would make of each row again and again, written once as shards.

A shard is written whole or not at all, and the manifest after it: what is killed goes on at the shard it was in.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from mmdiff import __version__
from mmdiff.build import open_rows
from mmdiff.config import Config, first_difference
from mmdiff.data import Batch, Rows, Table
from mmdiff.data.columns import Column
from mmdiff.data.encoded import FILE, FORMAT, SPLITS, Manifest, Shard, latents_of, read_manifest
from mmdiff.data.fingerprint import fingerprint
from mmdiff.data.order import Visit
from mmdiff.errors import InputError, at
from mmdiff.modalities import Anchor, Condition, FillsAnchor, Shape, find_modality
from mmdiff.modalities.autoencoder import digest
from mmdiff.resolve import resolve
from mmdiff.training.disk import PARTIAL, faults, remove, whole
from mmdiff.training.lock import locked
from mmdiff.training.process import set_threads

KEY, LOCK = "--out", "encode.lock"
GROUP = 2**24  # bytes of a row group, which streaming reads at once
#: keys of the config that change nothing of what is written
_FREE = {"name", "output", "track", "backbone", "scheduler", "states", "loss", "train", "sample", "evaluate"} | {
    f"data.{key}" for key in ("augment", "missing", "masking", "cache_mib", "workers", "streaming", "streams")
}


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


def run(request: Request) -> str:
    """Encode both splits; returns what was written, in words.

    Raises:
        InputError: the config, the data or the folder do not fit.
        TrainingError: the disk refuses.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("WORLD_SIZE", os.environ["WORLD_SIZE"], "mmdiff encode is one process; start no more of them")
    config, out = request.config, request.out.expanduser()
    if config.data.buckets is not None:
        raise InputError("data.buckets", config.anchor, "would be written at one size; leave buckets out")
    if read_manifest(config.data.source) is not None:
        raise InputError("data.source", config.data.source, "is encoded already; name the source that it was made of")
    _check_free(out)
    set_threads(config.train.threads)
    splits = dict(zip(SPLITS, open_rows(config)))
    config = resolve(config, splits["train"])
    _check_images(config, request)
    encoder = Encoder(config, request)
    with faults(out, "call it again, it goes on", f"{KEY}"):
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, LOCK, KEY):
            for leftover in out.glob(f"{PARTIAL}*"):
                remove(leftover)
            return _encode(encoder, splits, out)


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


def _check_images(config: Config, request: Request) -> None:
    """Refuse to leave images out that training looks at."""
    for name, entry in config.modalities.items():
        if not request.images and issubclass(find_modality(entry.kind, f"modalities.{name}.kind"), FillsAnchor):
            raise InputError("--no-images", name, f"is filled from the images of {config.anchor}; leave the option out")


def _check_free(out: Path) -> None:
    """Refuse a folder of other content.

    Raises:
        InputError: naming what is there.
    """
    if out.exists() and not out.is_dir():
        raise InputError(KEY, str(out), "is a file; name a folder")
    if not out.is_dir() or read_manifest(str(out), KEY) is not None:
        return
    for path in sorted(out.iterdir()):
        if not (path.name.startswith(PARTIAL) or LOCK in path.name):
            raise InputError(KEY, str(out), f"holds {path.name}, which is none of its files; choose another folder")


def _encode(encoder: Encoder, splits: dict[str, Rows], out: Path) -> str:
    """Write what the folder lacks."""
    fresh = _manifest(encoder, splits)
    manifest = read_manifest(str(out), KEY)
    if manifest is None:
        manifest = fresh
        _save(manifest, out)
    else:
        _check_same(manifest, fresh, out)
    _check_shards(manifest, out)
    total, done = sum(fresh.rows.values()), sum(shard.rows for shard in manifest.shards)
    request = encoder.request
    with tqdm(total=total, initial=done, unit="row", desc="encode", disable=not request.progress) as bar:
        for split, rows in splits.items():
            first = sum(shard.rows for shard in manifest.shards if shard.split == split)
            table = encoder.table(rows)
            table.unusable.add(tuple(manifest.unusable))
            for cells in _shards(encoder, table, first, bar):
                number = sum(shard.split == split for shard in manifest.shards)
                file = out / f"{split}-{number:05d}.parquet"
                encoder.write(cells, file)
                count = len(next(iter(cells.values())))
                shard = Shard(file=file.name, split=split, rows=count, bytes=file.stat().st_size, sha256=_sha256(file))
                unusable = [*dict.fromkeys([*manifest.unusable, *table.unusable.lines])]
                update = {"shards": [*manifest.shards, shard], "unusable": unusable}
                manifest = manifest.model_copy(update=update)
                _save(manifest, out)
    if not manifest.complete:
        manifest = manifest.model_copy(update={"complete": True})
        _save(manifest, out)
    return _report(manifest, out, total - done)


def _shards(encoder: Encoder, table: Table, first: int, bar: tqdm) -> Iterator[dict[str, list[Any]]]:
    """The cells of one shard after the other, from a row on; rows are read ahead by `data.workers` processes."""
    size, count = encoder.request.rows_per_shard, len(table)
    ends = [(start, min(start + size, count)) for start in range(first, count, size)]
    step = encoder.batch_size
    parts = [range(row, min(row + step, end)) for start, end in ends for row in range(start, end, step)]
    loader = DataLoader(
        table,
        batch_sampler=[[Visit(row, row) for row in part] for part in parts],
        num_workers=encoder.config.data.workers,
        collate_fn=_as_read,
    )
    cells: dict[str, list[Any]] = {name: [] for name in encoder.columns}
    filled = 0
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        table.unusable.add(batch.unusable)
        for name, more in encoder.stored(batch).items():
            cells[name] += more
        filled, rows = filled + len(next(iter(batch.present.values()))), len(next(iter(batch.present.values())))
        bar.update(rows)
        if filled % size == 0 or first + filled == count:
            yield cells
            cells = {name: [] for name in encoder.columns}


def _as_read(batch: Batch | InputError) -> Batch | InputError:
    return batch


def _manifest(encoder: Encoder, splits: dict[str, Rows]) -> Manifest:
    """Of a folder without shards."""
    latents = latents_of(encoder.config.anchor) in encoder.columns
    return Manifest(
        format=FORMAT,
        made_by=__version__,
        complete=False,
        config=encoder.config.model_dump(mode="json"),
        rows={split: len(rows) for split, rows in splits.items()},
        data={split: fingerprint(rows) for split, rows in splits.items()},
        columns=encoder.columns,
        autoencoder=digest(encoder.anchor.frozen) if latents else None,
        batch_size=encoder.batch_size,
        rows_per_shard=encoder.request.rows_per_shard,
        images=encoder.config.anchor in encoder.columns,
        dtype=encoder.request.dtype,
        unusable=[],
        shards=[],
    )


def _check_same(then: Manifest, now: Manifest, out: Path) -> None:
    """A folder goes on with what it was begun with.

    Raises:
        InputError: naming the first key that differs.
    """
    remedy = "the folder was begun with {!r}; restore it, or choose another folder"
    if difference := first_difference(then.of(), now.of(), ignore=_FREE):
        key, before, value = difference
        raise InputError(key, value, f"{out}: {remedy.format(before)}")
    options = {"autoencoder", "batch_size", "rows_per_shard", "dtype", "images", "data", "columns"}
    for key in sorted(options):
        before, value = getattr(then, key), getattr(now, key)
        if before != value:
            name = "data.source" if key == "data" else f"--{key.replace('_', '-')}"
            raise InputError(name, value, f"{out}: {remedy.format(before)}")


def _check_shards(manifest: Manifest, out: Path) -> None:
    """Every file is as it was written."""
    for shard in manifest.shards:
        file = out / shard.file
        if not file.is_file() or _sha256(file) != shard.sha256:
            raise InputError(KEY, str(file), "is missing or not as it was written; remove the folder, encode again")


def _save(manifest: Manifest, out: Path) -> None:
    with whole(out / FILE) as partial:
        partial.write_text(manifest.model_dump_json(indent=1) + "\n")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _report(manifest: Manifest, out: Path, written: int) -> str:
    size = sum(shard.bytes for shard in manifest.shards) / 2**20
    rows = ", ".join(f"{count} {split}" for split, count in manifest.rows.items())
    lines = [f"{out}: {rows} rows in {len(manifest.shards)} shards, {size:.1f} MiB; {written} rows written now"]
    lines += [f"columns: {', '.join(manifest.columns)}", f"train on it with data.source={out}"]
    if manifest.unusable:
        lines.append(f"skipped values, which count as missing: {len(manifest.unusable)}, see {out / FILE}")
    return "\n".join(lines)
