"""A large request to the pipeline as several of a few samples each, under one progress bar."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor


def in_batches(
    pipeline: DiffusionPipeline,
    size: int,
    count: int,
    observed: dict[str, Tensor],
    generator: torch.Generator | list[torch.Generator] | None,
    **arguments: Any,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(samples, last draws, weights) of ``count`` samples, at most ``size`` at once.

    Args:
        pipeline: what is called; its progress bar counts samples, and its own are silent meanwhile.
        size: of a batch; the last may be smaller.
        count: how many samples.
        observed: {modality: values (count, …)}.
        generator: a list is split with the samples, one generator is drawn from by one batch after another.
        arguments: of the pipeline.
    """
    parts = []
    with pipeline.progress_bar(total=count) as bar:
        shown = dict(pipeline._progress_bar_config)
        pipeline.set_progress_bar_config(**{**shown, "disable": True})
        try:
            for start in range(0, count, size):
                rows = slice(start, min(start + size, count))
                own = generator[rows] if isinstance(generator, list) else generator
                given = {name: values[rows] for name, values in observed.items()}
                parts.append(pipeline(rows.stop - start, given, generator=own, return_dict=False, **arguments))
                bar.update(rows.stop - start)
        finally:
            pipeline.set_progress_bar_config(**shown)
    samples, draws, weights = (
        {name: _joined([part[name] for part in side]) for name in side[0]} for side in zip(*parts, strict=True)
    )
    return samples, draws, weights


def _joined(parts: list[Any]) -> Any:
    """Tensors, or lists of what a person wants, as one."""
    return torch.cat(parts) if isinstance(parts[0], Tensor) else [one for part in parts for one in part]
