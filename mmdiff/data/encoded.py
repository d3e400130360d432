"""Encoded data sets: what `mmdiff encode` writes, a folder of parquet shards with a manifest, and how it is read.

A training on the folder sees the values, latents and rows that a training on the source sees, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import datasets
import pydantic
from pydantic import Field

from mmdiff.config import Config, DataConfig, parse_config
from mmdiff.config.base import Strict
from mmdiff.data.columns import Column
from mmdiff.data.files import undecoded
from mmdiff.data.streamed import open_streamed
from mmdiff.data.table import Batch, Rows, Table
from mmdiff.errors import InputError, at
from mmdiff.trust import check_links

FILE, FORMAT = "manifest.json", 1
SPLITS = ("train", "validation")
_LARGEST = 2**27  # bytes of a manifest
#: keys of `data` that decided what was written
_DECIDED = ("options", "columns", "split", "validation_split", "holdout", "embeddings", "one_of")


class Shard(Strict):
    """One file of rows."""

    file: str = Field(pattern=r"^(train|validation)-\d{5,9}\.parquet$")
    split: Literal["train", "validation"]
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str


class Manifest(Strict):
    """What a folder holds, and what it was made of."""

    format: int
    made_by: str  # the version of mmdiff
    complete: bool
    config: dict[str, Any]  # resolved
    rows: dict[str, int]  # of every split
    data: dict[str, dict[str, Any]]  # {split: fingerprint of the source}
    columns: dict[str, Column]  # {modality, or <anchor>/latents: how its values stand}
    autoencoder: str | None  # hash of the network that made the latents
    batch_size: int  # images that the autoencoder was given at once
    rows_per_shard: int
    images: bool  # whether the anchor's images are there beside its latents
    dtype: Literal["float32", "float16"]  # of latents and other arrays of floats
    unusable: dict[str, list[str]]  # {split: an error line for every value that was skipped}
    shards: list[Shard]

    def of(self) -> Config:
        """The config that made the folder."""
        return parse_config(self.config)


def latents_of(anchor: str) -> str:
    """The name of a column of latents; no modality's name has a slash."""
    return f"{anchor}/latents"


def folder_of(source: Any) -> Path | None:
    """The folder of an encoded data set, or None."""
    folder = Path(source).expanduser() if isinstance(source, str) and source else None
    return folder if folder is not None and (folder / FILE).is_file() else None


def read_manifest(source: Any, key: str = "data.source") -> Manifest | None:
    """The manifest of an encoded data set; None for any other source.

    Args:
        source: a folder, or whatever `data.source` is.
        key: for errors.

    Raises:
        InputError: it is damaged, of another format, or leads out of its folder.
    """
    folder = folder_of(source)
    if folder is None:
        return None
    file = folder / FILE
    try:
        if file.stat().st_size > _LARGEST:
            raise InputError(key, str(file), "is too large for a manifest")
        manifest = Manifest.model_validate_json(file.read_bytes())
    except pydantic.ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        remedy = f"is no manifest of mmdiff encode ({place}: {error.errors()[0]['msg']}); encode the data again"
        raise InputError(key, str(file), remedy) from None
    except OSError as error:
        raise InputError(key, str(file), f"cannot be read: {error.strerror}") from None
    if manifest.format != FORMAT:
        raise InputError(key, str(file), f"has the format {manifest.format}, this mmdiff reads {FORMAT}; encode again")
    with at(f"{key}, {file}", ": "):
        manifest.of()
    check_links(key, folder)
    return manifest


def check_decided(data: DataConfig, manifest: Manifest) -> None:
    """Refuse settings of the data that differ from those with which they were encoded; defaults are left to these.

    Raises:
        InputError: naming the key.
    """
    made, default = manifest.of().data, DataConfig(source=data.source)
    if data.buckets is not None:
        raise InputError("data.buckets", data.source, "was encoded at one size; leave buckets out")
    for key in _DECIDED:
        own, then = getattr(data, key), getattr(made, key)
        if own not in (then, getattr(default, key)):
            raise InputError(f"data.{key}", own, f"{data.source} was encoded with {then}; restore it, or encode again")


def open_encoded(data: DataConfig, manifest: Manifest) -> tuple[Rows, Rows]:
    """(training rows, held-out rows) of an encoded data set.

    Args:
        data: its settings.
        manifest: of its folder.

    Raises:
        InputError: it is not complete, or a shard is not as it was written.
    """
    folder = folder_of(data.source)
    if not manifest.complete:
        remedy = f"is encoded by half; call mmdiff encode … --out {folder} again, it goes on where it stopped"
        raise InputError("data.source", str(folder), remedy)
    for shard in manifest.shards:
        file = folder / shard.file
        size = file.stat().st_size if file.is_file() else None
        if size != shard.bytes:
            fault = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
            raise InputError("data.source", str(file), f"{fault}; encode the data again")
    files = {split: [str(folder / s.file) for s in manifest.shards if s.split == split] for split in SPLITS}
    if data.streaming:
        splits: Mapping[str, Any] = open_streamed(data.streams, "parquet", data_files=files)
    else:
        splits = datasets.load_dataset("parquet", data_files=files)
    for split in SPLITS:
        if len(splits[split]) != manifest.rows[split]:
            remedy = f"has {len(splits[split])} rows of {split}, its manifest says {manifest.rows[split]}; encode again"
            raise InputError("data.source", str(folder), remedy)
    return tuple(undecoded(splits[split]) for split in SPLITS)


class LatentTable(Table):
    """Rows whose anchor is read as latents where training visits them, and as images where people and metrics look.

    Args:
        whole: makes the table with images.
        arguments: of `Table`.
    """

    def __init__(self, whole: Callable[[], Table], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._whole = whole

    def all(self, limit: int | None = None) -> Batch:
        """The first ``limit`` rows, or all rows, with images."""
        return self._whole().all(limit)
