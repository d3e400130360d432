"""The folder of an encoded data set while it is written: whether it is free, what it was begun with, what it has."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mmdiff import __version__
from mmdiff.config import first_difference
from mmdiff.data import Rows
from mmdiff.data.encoded import FILE, FORMAT, Manifest, latents_of, read_manifest
from mmdiff.data.fingerprint import fingerprint
from mmdiff.encode.encoder import Encoder
from mmdiff.errors import InputError
from mmdiff.modalities.autoencoder import digest
from mmdiff.training.disk import PARTIAL, whole

KEY, LOCK = "--out", "encode.lock"
#: keys of the config that change nothing of what is written
_FREE = {"name", "output", "track", "backbone", "scheduler", "states", "loss", "train", "sample", "evaluate"} | {
    f"data.{key}" for key in ("augment", "missing", "masking", "cache_mib", "workers", "streaming", "streams")
}


def check_free(out: Path) -> None:
    """Refuse a folder of other content.

    Raises:
        InputError: naming what is there.
    """
    if not out.is_dir() and (out.exists() or out.is_symlink()):
        raise InputError(KEY, str(out), "is a file, or a link to nothing; name a folder")
    if not out.is_dir() or read_manifest(str(out), KEY) is not None:
        return
    for path in sorted(out.iterdir()):
        if not (path.name.startswith(PARTIAL) or LOCK in path.name):
            raise InputError(KEY, str(out), f"holds {path.name}, which is none of its files; choose another folder")


def fresh_manifest(encoder: Encoder, splits: dict[str, Rows]) -> Manifest:
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
        unusable={split: [] for split in splits},
        shards=[],
    )


def check_same(then: Manifest, now: Manifest, out: Path) -> None:
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


def check_shards(manifest: Manifest, out: Path) -> None:
    """Every file is as it was written."""
    for shard in manifest.shards:
        file = out / shard.file
        if not file.is_file() or sha256(file) != shard.sha256:
            raise InputError(KEY, str(file), "is missing or not as it was written; remove the folder, encode again")


def save(manifest: Manifest, out: Path) -> None:
    with whole(out / FILE) as partial:
        partial.write_text(manifest.model_dump_json(indent=1) + "\n")


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
