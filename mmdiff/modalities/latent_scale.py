"""What brings latents to unit scale: the numbers of an autoencoder's config, or those measured on images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.modalities.autoencoder import FAMILIES, Posterior

MEASURED = 2048  # images whose latents are measured
_AT_ONCE = 16


class Scale(NamedTuple):
    """Latents at unit scale are (latent − shift) · factor, with numbers or tensors (1, C, 1, 1)."""

    shift: float | Tensor
    factor: float | Tensor

    def to(self, device: torch.device) -> Scale:
        """The same on a device."""
        return Scale(*(part.to(device) if isinstance(part, Tensor) else part for part in self))


def given_scale(mean: list[float] | None, std: list[float] | None, channels: int) -> Scale | None:
    """The scale of the settings latents_mean and latents_std; None without them.

    Raises:
        InputError: naming the setting that does not fit.
    """
    if mean is None and std is None:
        return None
    for key, numbers in (("latents_mean", mean), ("latents_std", std)):
        if numbers is None or len(numbers) != channels:
            raise InputError(key, numbers, f"needs {channels} numbers, one per latent channel")
    if min(std) <= 0:
        raise InputError("latents_std", std, "must be positive")
    return measured_scale(mean, std)


def scale_of_config(name: str, config: Mapping[str, Any]) -> Scale | None:
    """What a config says of the scale of the latents; None where it says nothing.

    Args:
        name: of the class.
        config: of the network.

    Returns:
        By `latents_mean` and `latents_std` per channel, else by `shift_factor` and `scaling_factor`, as diffusers'
        pipelines.
    """
    mean, std, factor = (config.get(key) for key in ("latents_mean", "latents_std", "scaling_factor"))
    if FAMILIES[name].scaled:
        return Scale(0.0, 1.0) if std is not None else None
    if mean is not None and std is not None:
        return measured_scale(mean, std, 1.0 if factor is None else factor)
    return None if factor is None else Scale(config.get("shift_factor") or 0.0, factor)


def measured_scale(mean: Iterable[float], std: Iterable[float], factor: float = 1.0) -> Scale:
    """The scale by each channel's mean and standard deviation."""
    shift, width = (torch.tensor(list(numbers)).reshape(1, -1, 1, 1) for numbers in (mean, std))
    return Scale(shift, factor / width)


def measure(
    values: Iterable[Any], preprocess: Callable[[Any], Tensor], posterior: Callable[[Tensor], Posterior]
) -> dict[str, list[float]]:
    """Mean and standard deviation of each latent channel over images, to six digits, as settings.

    Args:
        values: raw images, which are asked for twice; None is skipped, and `MEASURED` of them are taken, evenly spaced.
        preprocess: raw image -> value.
        posterior: values -> their latents.

    Raises:
        InputError: there are none, or a channel never changes.
    """
    step = max(1, sum(raw is not None for raw in values) // MEASURED)
    chosen = itertools.islice((raw for raw in values if raw is not None), 0, step * MEASURED, step)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    while raws := list(itertools.islice(chosen, _AT_ONCE)):
        numbers = posterior(torch.stack([preprocess(raw) for raw in raws]).to(device)).mean.double().cpu()
        count += numbers[:, 0].numel()
        total, squares = total + numbers.sum(dim=(0, 2, 3)), squares + numbers.square().sum(dim=(0, 2, 3))
    if not count:
        raise InputError("latent_scale", "measured", "there is no image to measure; check data.columns")
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    if not bool((std > 1e-6 * (1 + mean.abs())).all()):  # NaN, too
        raise InputError("latent_scale", "measured", "a channel of the latents is the same in all images; set config")
    return {"latents_mean": [_rounded(x) for x in mean.tolist()], "latents_std": [_rounded(x) for x in std.tolist()]}


def _rounded(number: float) -> float:
    return round(number, 6 - math.floor(math.log10(abs(number)))) if number else 0.0
