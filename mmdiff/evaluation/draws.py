"""Samples for an evaluation, and the rows of them that are shown."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor

from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.sampling.heads import heads

PICTURED = 8  # rows of a picture


def draw(pipeline: MTDiffusionPipeline, count: int, batch_size: int, seed: int, **arguments: Any) -> dict[str, Tensor]:
    """``count`` samples in batches, as tensors on the CPU; last draws under "<name>/last"."""
    generator = torch.Generator().manual_seed(seed)
    observed = arguments.pop("observed", {})
    parts: list[dict[str, Tensor]] = []
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        output = pipeline(
            batch_size=size,
            observed={name: value[start : start + size] for name, value in observed.items()},
            generator=generator,
            output_type="pt",
            return_last_draws=True,
            **arguments,
        )
        last = {f"{name}/last": value for name, value in output.last_draws.items()}
        parts.append({name: value.cpu() for name, value in (output.samples | last).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def read_params(pipeline: MTDiffusionPipeline, name: str, anchors: Tensor, batch_size: int) -> Tensor:
    """Params of a modality's head given clean anchors, in one evaluation, on the model's device."""
    model = pipeline.model
    parts = anchors.to(model.device).split(batch_size)
    read = (heads(model, pipeline.scheduler, {model.anchor: part}, {model.anchor}) for part in parts)
    return torch.cat([params[name] for params in read])


def pictured(count: int) -> Tensor:
    """Rows for a picture, evenly spread: neighbouring rows of a data set are often alike."""
    return torch.linspace(0, count - 1, min(count, PICTURED)).round().long()


def on_grey(picture: PILImage.Image) -> PILImage.Image:
    """A picture with an alpha channel, its holes grey."""
    ground = PILImage.new("RGBA", picture.size, (128, 128, 128, 255))
    return PILImage.alpha_composite(ground, picture.convert("RGBA")).convert(picture.mode.removesuffix("A"))
