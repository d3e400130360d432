"""The work of `mmdiff encode`.

A shard is written whole or not at all, and the manifest after it: what is killed goes on at the shard it was in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from mmdiff.build import open_rows
from mmdiff.config import Config
from mmdiff.data import Batch, Rows, Table
from mmdiff.data.encoded import FILE, SPLITS, Manifest, Shard, read_manifest
from mmdiff.data.order import Visit
from mmdiff.encode.encoder import Encoder, Request
from mmdiff.encode.folder import KEY, LOCK, check_free, check_same, check_shards, fresh_manifest, save, sha256
from mmdiff.errors import InputError
from mmdiff.modalities import FillsAnchor, find_modality
from mmdiff.resolve import resolve
from mmdiff.training.disk import PARTIAL, faults, remove
from mmdiff.training.lock import locked
from mmdiff.training.process import set_threads


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
    check_free(out)
    set_threads(config.train.threads)
    splits = dict(zip(SPLITS, open_rows(config)))
    config = resolve(config, splits["train"])
    _check_images(config, request)
    encoder = Encoder(config, request)
    with faults(out, "call it again, it goes on", KEY):
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, LOCK, KEY):
            for leftover in out.glob(f"{PARTIAL}*"):
                remove(leftover)
            return _encode(encoder, splits, out)


def _check_images(config: Config, request: Request) -> None:
    """Refuse to leave images out that training looks at."""
    for name, entry in config.modalities.items():
        if not request.images and issubclass(find_modality(entry.kind, f"modalities.{name}.kind"), FillsAnchor):
            raise InputError("--no-images", name, f"is filled from the images of {config.anchor}; leave the option out")


def _encode(encoder: Encoder, splits: dict[str, Rows], out: Path) -> str:
    """Write what the folder lacks."""
    fresh = fresh_manifest(encoder, splits)
    manifest = read_manifest(str(out), KEY)
    if manifest is None:
        manifest = fresh
        save(manifest, out)
    else:
        check_same(manifest, fresh, out)
    check_shards(manifest, out)
    total, done = sum(fresh.rows.values()), sum(shard.rows for shard in manifest.shards)
    request = encoder.request
    with tqdm(total=total, initial=done, unit="row", desc="encode", disable=not request.progress) as bar:
        for split, rows in splits.items():
            first = sum(shard.rows for shard in manifest.shards if shard.split == split)
            table = encoder.table(rows)
            table.unusable.add(manifest.unusable.get(split, []))
            for cells in _shards(encoder, table, first, bar):
                number = sum(shard.split == split for shard in manifest.shards)
                file = out / f"{split}-{number:05d}.parquet"
                encoder.write(cells, file)
                count = len(next(iter(cells.values())))
                shard = Shard(file=file.name, split=split, rows=count, bytes=file.stat().st_size, sha256=sha256(file))
                skipped = {**manifest.unusable, split: list(table.unusable.lines)}
                manifest = manifest.model_copy(update={"shards": [*manifest.shards, shard], "unusable": skipped})
                save(manifest, out)
    if not manifest.complete:
        manifest = manifest.model_copy(update={"complete": True})
        save(manifest, out)
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
        rows = len(next(iter(batch.present.values())))
        filled += rows
        bar.update(rows)
        if filled % size == 0 or first + filled == count:
            yield cells
            cells = {name: [] for name in encoder.columns}


def _as_read(batch: Batch | InputError) -> Batch | InputError:
    return batch


def _report(manifest: Manifest, out: Path, written: int) -> str:
    size = sum(shard.bytes for shard in manifest.shards) / 2**20
    rows = ", ".join(f"{count} {split}" for split, count in manifest.rows.items())
    lines = [f"{out}: {rows} rows in {len(manifest.shards)} shards, {size:.1f} MiB; {written} rows written now"]
    lines += [f"columns: {', '.join(manifest.columns)}", f"train on it with data.source={out}"]
    if skipped := sum(map(len, manifest.unusable.values())):
        lines.append(f"skipped values, which count as missing: {skipped}, see {out / FILE}")
    return "\n".join(lines)
