"""One call to the pipeline: its checked arguments, and their split into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.model import MTDiffusionModel
from mmdiff.sampling.arguments import generators, scales
from mmdiff.sampling.conditioning import Conditioning, aggregated_names, conditioning_of, feedback_for, peak_weights
from mmdiff.sampling.observed import observed_values
from mmdiff.sampling.phases import Phases, phases_of
from mmdiff.schedulers import MTScheduler
from mmdiff.values import plain, switch, whole

Generators = torch.Generator | list[torch.Generator] | None
Noise = Callable[[tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Request:
    """The checked arguments of a call.

    Attributes:
        model: of the pipeline, at the size of the call.
        count: B, how many samples.
        values: {observed modality: (B, …)}.
        steps: of the solver; 0: only the heads are read.
        conditioning: how the observed values steer.
        phases: what is denoised together, and how the rest is read.
        feedback: how unobserved aggregated modalities re-enter c_t.
        levels: timesteps at which the heads read the finished anchor; None: they read its observation channels.
        generator: one, or a list of one per sample.
        max_batch_size: number of samples per batch.
        paste_back, final_read, return_last_draws, output_type: as of the pipeline.
    """

    model: MTDiffusionModel
    count: int
    values: dict[str, Tensor]
    steps: int
    conditioning: Conditioning
    phases: Phases
    feedback: str
    levels: tuple[int, ...] | None
    generator: Generators
    max_batch_size: int
    paste_back: bool
    final_read: bool
    return_last_draws: bool
    output_type: str

    def batches(self) -> Iterator[Request]:
        """The request in parts of at most ``max_batch_size`` samples; a list of generators is split with them."""
        for start in range(0, self.count, self.max_batch_size):
            rows = slice(start, min(start + self.max_batch_size, self.count))
            values = {name: value[rows] for name, value in self.values.items()}
            generator = self.generator[rows] if isinstance(self.generator, list) else self.generator
            yield replace(self, count=rows.stop - start, values=values, generator=generator)

    def noise(self, model: MTDiffusionModel) -> Noise:
        """shape -> standard normal noise (B, *shape).

        The device is looked up once: in diffusers `model.device` searches all modules.
        """
        single = isinstance(self.generator, list) and len(self.generator) == 1
        generator = self.generator[0] if single else self.generator
        device, dtype = model.device, model.value_dtype
        return lambda shape: randn_tensor((self.count, *shape), generator=generator, device=device, dtype=dtype)


def request_of(model: MTDiffusionModel, scheduler: MTScheduler, arguments: Mapping[str, Any]) -> Request:
    """The checked request of a call.

    Args:
        model, scheduler: of the pipeline.
        arguments: {argument of the pipeline's call: value}.

    Raises:
        InputError: naming the argument, the value and the remedy.
    """
    if not isinstance(arguments["output_type"], str) or arguments["output_type"] not in ("pil", "pt"):
        raise InputError("output_type", arguments["output_type"], "choose pil or pt")
    batch_size, largest = (_optional(arguments, key) for key in ("batch_size", "max_batch_size"))
    flags = {key: switch(key, arguments[key]) for key in ("paste_back", "final_read", "return_last_draws")}
    steps = whole("num_inference_steps", arguments["num_inference_steps"], 0)
    classifier_free, by_heads = (scales(key, arguments[key]) for key in ("guidance_scale", "head_guidance_scale"))
    resampling, read_timesteps = (plain(key, arguments[key]) for key in ("resampling", "read_timesteps"))
    model = model.of_size(*(_optional(arguments, key) for key in ("height", "width")))
    values = observed_values(model, {} if arguments["observed"] is None else arguments["observed"], batch_size)
    count = len(next(iter(values.values()))) if values else batch_size or 1
    generator = generators(arguments["generator"], count)
    unknown = set(model.gains) - set(values)
    aggregated = aggregated_names(arguments["aggregate"], peak_weights(scheduler), unknown)
    conditioning = conditioning_of(
        model, values, arguments["conditioning"], aggregated, classifier_free, by_heads, resampling, steps != 0
    )
    levels = read_levels(read_timesteps, model, len(scheduler))
    how = arguments["order"], arguments["read"], arguments["read_steps"]
    return Request(
        model=model,
        count=count,
        values=values,
        steps=steps,
        conditioning=conditioning,
        phases=phases_of(model, values, steps, len(scheduler), *how, by_levels=read_timesteps is not None),
        feedback=feedback_for(arguments["feedback"], scheduler.is_stochastic),
        levels=levels,
        generator=generator,
        max_batch_size=largest or count,
        output_type=arguments["output_type"],
        **flags,
    )


def read_levels(read_timesteps: Sequence[int] | None, model: MTDiffusionModel, total: int) -> tuple[int, ...] | None:
    """The timesteps at which the heads read the anchor; None: they read its observation channels, as trained.

    Raises:
        InputError: for a timestep outside 0 … total − 1.
    """
    if read_timesteps is None:
        return None if model.anchor in model.observable else (0,)
    levels = tuple(read_timesteps) if isinstance(read_timesteps, Sequence) else (read_timesteps,)
    if not levels or not all(type(level) is int and 0 <= level < total for level in levels):
        raise InputError("read_timesteps", read_timesteps, f"needs one or several whole numbers, 0 … {total - 1}")
    return levels


def _optional(arguments: Mapping[str, Any], key: str) -> int | None:
    return None if arguments[key] is None else whole(key, arguments[key], 1)
