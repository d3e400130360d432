"""The sizes at which training reads images of several shapes: from `data.buckets` to the bucket of every row."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from mmdiff.config import BucketsConfig, Config
from mmdiff.data import Rows
from mmdiff.data.buckets import Buckets, Reader, Size, generated_sizes, nearest
from mmdiff.data.fingerprint import fingerprint
from mmdiff.data.opening import cached_array
from mmdiff.data.streamed import StreamedRows
from mmdiff.data.table import ROW, origin
from mmdiff.errors import InputError, at
from mmdiff.modalities import Condition, Modality
from mmdiff.model import MTDiffusionModel

KEY = "data.buckets"


def reader_of(model: MTDiffusionModel) -> Reader:
    """How rows become values of the model's size."""
    return Reader(
        preprocess={name: model.modalities[name].preprocess for name in model.names},
        placeholders={name: model.modalities[name].placeholder() for name in model.names},
    )


def build_buckets(config: Config, model: MTDiffusionModel, rows: Rows) -> Buckets | None:
    """The buckets of `data.buckets` with that of every row, by the header of its image; None without buckets.

    Args:
        config: resolved.
        model: whose modalities must be able to have these sizes.
        rows: of the training.

    Raises:
        InputError: for a size that the model or a modality cannot have, and for an anchor without a size.
    """
    if config.data.buckets is None:
        return None
    base = tuple(model.modalities[model.anchor].value_shape[-2:])
    sizes = [tuple(size) for size in config.data.buckets.sizes or ()] or _generated(config.data.buckets, model, base)
    if len(set(sizes)) < len(sizes):
        raise InputError(f"{KEY}.sizes", sizes, "names a size twice; leave one out")
    readers = []
    for height, width in sizes:
        with at(KEY, join=None, keys={"height and width": f"{KEY}.sizes"}):
            sized = model.of_size(height, width)
        _check(sized)
        readers.append(reader_of(sized))
    read = functools.partial(_of_rows, config, model, rows, sizes, base)
    if not isinstance(rows, StreamedRows):
        return Buckets(sizes, readers, read())
    anchor = type(model.modalities[model.anchor]).__qualname__, config.column(model.anchor)
    key = repr((fingerprint(rows), config.data.holdout, anchor, sizes, base))
    return Buckets(sizes, readers, cached_array("buckets", key, len(rows), read))  # a pass over all files else


def _generated(config: BucketsConfig, model: MTDiffusionModel, base: Size) -> list[Size]:
    unit = model.backbone.multiple
    needed = [unit * side // inner for side, inner in zip(base, model.space[1:], strict=True)]
    steps = [math.lcm(least, config.multiple or 1) for least in needed]
    if any(side % step for side, step in zip(base, steps, strict=True)):
        remedy = f"gives with the backbone multiples of {steps[0]} and {steps[1]}; {base} is none"
        raise InputError(f"{KEY}.multiple", config.multiple, remedy)
    sizes = generated_sizes(base, (steps[0], steps[1]), config.ratio)
    if len(sizes) == 1:
        remedy = f"gives no size but {base} by multiples of {steps[0]} and {steps[1]}; raise it, or set sizes"
        raise InputError(f"{KEY}.ratio", config.ratio, remedy)
    return sizes


def _of_rows(config: Config, model: MTDiffusionModel, rows: Rows, sizes: list[Size], base: Size) -> np.ndarray:
    """(rows,) the bucket of each; rows without an image, or with one that is skipped, are in that of the base's."""
    anchor, column, usual = model.modalities[model.anchor], config.column(model.anchor), nearest(sizes, base)
    chosen = rows.select_columns(sorted({column, ROW} & set(rows.column_names)))
    of_rows = np.full(len(chosen), usual, dtype=np.int64)
    for index in range(len(chosen)):
        try:
            row = chosen[index]
            if not anchor.is_missing(row[column]):
                place = f"data.columns.{model.anchor}={column}, row {row.get(ROW, index)} of "
                with at(f"{place}{origin(config.data.source, rows)}", ": "):
                    size = anchor.size_of(row[column])
                if size is None:
                    remedy = "does not say the size of a raw value (its method size_of); leave buckets out"
                    raise InputError(KEY, type(anchor).__name__, remedy)
                of_rows[index] = nearest(sizes, size)
        except InputError as error:
            if config.data.on_error == "raise" or error.key == KEY:
                raise
    return of_rows


@torch.no_grad()
def _check(model: MTDiffusionModel) -> None:
    """Every modality but the anchor works at the size of the model."""
    height, width = model.modalities[model.anchor].value_shape[-2:]
    for name in model.auxiliary:
        try:
            _use(model.modalities[name])
        except Exception as error:  # of a class of one's own, of any kind
            remedy = f"{name} ({type(model.modalities[name]).__name__}) cannot have this size: {error}"
            raise InputError(KEY, f"{width}x{height}", remedy) from error


def _use(modality: Condition) -> None:
    """Encode, observe and read one value."""
    shape, generator = modality.shape, torch.Generator().manual_seed(0)
    value = modality.examples(1, generator)
    modality.check(value)
    for part, channels in ((modality.encode(value), shape.space[0]), (modality.observe(value), None)):
        wanted = (1, modality.observation_channels if channels is None else channels, *shape.space[1:])
        if tuple(part.shape) != wanted:
            raise ValueError(f"it becomes {tuple(part.shape)}, expected {wanted}")
    if isinstance(modality, Modality):
        size = (side // shape.stride for side in shape.space[1:])
        features, pooled = torch.zeros(1, shape.features, *size), torch.zeros(1, shape.pooled)
        modality.nll(modality.decode(features, pooled), value)
