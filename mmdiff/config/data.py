"""Where rows come from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from mmdiff.config.base import Share, Strict


class MaskingConfig(Strict):
    """Random holes in the anchor: a new one at every visit of a row in training, one per row in evaluation."""

    pattern: str = "squares"  # squares, box, half, checkerboard, free-form; mixed: one of these per row
    ratio: tuple[Share, Share] = (0.1, 0.75)  # share of hidden pixels, one number or a range

    @field_validator("ratio", mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class EmbeddingConfig(Strict):
    """Image embeddings by a frozen CLIP tower, computed once and cached."""

    model: str = "ViT-B-32"  # name of the model in open_clip
    pretrained: str | None = "laion2b_s34b_b79k"  # tag of its weights in open_clip, or a local checkpoint
    column: str = "image"  # column of the images


class DataConfig(Strict):
    """Where rows come from."""

    # a built-in set (digits, shapes, folders …), a file, a glob or a list of them, a folder, or a hub name
    source: str | list[str]
    options: dict[str, Any] = {}  # arguments of a built-in set, or of `datasets.load_dataset`
    columns: dict[str, str] = {}  # {modality: column}; default: the column of the modality's name
    masking: dict[str, MaskingConfig] = {}  # {modality: holes}: made from the anchor, not read from a column
    embeddings: dict[str, EmbeddingConfig] = {}  # {modality: encoder}: computed if the source lacks the column
    missing: dict[str, Share] = {}  # {modality: share of training rows whose value is hidden}
    split: str = "train"  # name of the training split
    validation_split: str = "validation"  # name of the held-out split
    holdout: int | None = Field(None, ge=2, lt=2**31)  # k: hold out every k-th row of `split` instead
    cache_mib: float = Field(512.0, ge=0, le=1e9)  # keep decoded rows in memory if they fit into this many MiB
    workers: int = Field(0, ge=0, le=1024)  # processes that read rows
    streaming: bool = False  # read parquet, arrow and tar shards where they lie: nothing is copied or kept in memory
    streams: int = Field(32, ge=1, le=65_536)  # of a streamed data set: a batch comes from at most so many places of it
    on_error: Literal["raise", "skip"] = "raise"  # skip: a value that cannot be used counts as missing
    max_errors: Share = 0.01  # largest share of rows with such a value; more stop the run

    @field_validator("source", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        several = value if isinstance(value, list) and value else [value]
        if not all(isinstance(one, str) and one.strip() for one in several):
            raise ValueError("name a source, or a list of files")
        return value
