"""`mmdiff encode`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mmdiff.cli.options import ConfigPath, Overrides, echo


class Precision(StrEnum):
    """Of arrays of floats."""

    float32 = "float32"
    float16 = "float16"


def encode(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="the folder; the same command goes on there")] = ...,  # type: ignore[assignment]
    rows_per_shard: Annotated[int, typer.Option(help="rows of a file", min=1, max=10**7)] = 1024,
    dtype: Annotated[Precision, typer.Option(help="of latents and maps; float16 is half as large, not exact")] = (
        Precision.float32
    ),
    images: Annotated[bool, typer.Option(help="write images beside latents; evaluation needs them")] = True,
    batch_size: Annotated[
        int | None, typer.Option(help="images that the autoencoder gets at once; default: as in training", min=1)
    ] = None,
) -> None:
    """Write latents, embeddings and resized images once, as parquet shards.

    Then train on the folder: `mmdiff train CONFIG data.source=FOLDER`.
    """
    from mmdiff.config import load_config

    loaded = load_config(config, overrides)
    from mmdiff.encode import Request, run

    echo(run(Request(loaded, out, rows_per_shard, dtype.value, images, batch_size)))
