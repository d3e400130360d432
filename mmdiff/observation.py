"""What the backbone sees beside z_t: values, flags and, of diffused modalities, noisy signals and their times."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from mmdiff.backbones import Observation
from mmdiff.errors import InputError, at
from mmdiff.modalities import Condition, Diffusible
from mmdiff.modalities.query import asked
from mmdiff.schedulers.arguments import check_value
from mmdiff.slots import ModalitySlots, Slot, slots
from mmdiff.states import TIME_NUMBERS, time_numbers


class Noisy(NamedTuple):
    """zⁱ_τ of Eq. (25): ``sample`` (B, *signal_shape), and ``share`` (B,), τ/T in [0, 1].

    At share 0 the sample is the signal, and the modality is observed; at share 1 it is absent.
    """

    sample: Tensor
    share: Tensor


def gains_of(diffused: Any, modalities: Mapping[str, Condition], auxiliary: Collection[str]) -> dict[str, float]:
    """{diffused modality: gain}, checked.

    Raises:
        InputError: for a name that is no auxiliary modality, and one that has no process of its own.
    """
    check_value("diffused", diffused, dict[str, Annotated[float, Field(gt=0, le=1e4)]] | None)
    for name in sorted(diffused or {}):
        if name not in auxiliary:
            raise InputError("diffused", name, f"choose from {', '.join(auxiliary) or 'no auxiliary modality'}")
        with at(f"modalities.{name}"):
            if not isinstance(modalities[name], Diffusible):
                kind = type(modalities[name]).__name__
                remedy = f"{kind} has no process of its own; leave it out (mask, dense, image, embedding, vector have)"
                raise InputError("diffused", True, remedy)
            modalities[name].check_diffused()
    return dict(diffused or {})


class Entry(NamedTuple):
    """One modality's part: ``flags`` (B, 2 + 16 if diffused), ``channels`` (B, O, H, W), ``context`` (B, V)."""

    flags: Tensor
    channels: Tensor
    context: Tensor


def observation_of(
    modalities: Mapping[str, Condition],
    gains: Mapping[str, float],
    values: Mapping[str, Tensor],
    aggregated: Mapping[str, Tensor],
    observed: Mapping[str, Tensor],
    noisy: Mapping[str, Noisy],
    like: Tensor,
) -> Observation:
    """The backbone's second input; see `MTDiffusionModel.observation`.

    Args:
        modalities: in the order of their names.
        gains: {diffused modality: gain}.
        values, aggregated, observed, noisy, like: see there.
    """
    nowhere = torch.zeros(len(like), dtype=torch.bool, device=like.device)
    channels, context = [], []
    for name in modalities:
        modality = asked(modalities, name, values, observed)
        pair = aggregated.get(name, nowhere), observed.get(name, nowhere)
        if name in gains:
            state = noisy.get(name) or _noiseless(modality, gains[name], values.get(name), pair[1])
            entry = _diffused(modality, state, pair[0], like)
        else:
            entry = _plain(modality, values.get(name) if name in observed else None, pair, like)
        channels.append(entry.channels)
        context += [entry.flags, entry.context]
    return Observation(torch.cat(channels, dim=1), torch.cat(context, dim=1))


def _plain(modality: Condition, value: Tensor | None, pair: tuple[Tensor, Tensor], like: Tensor) -> Entry:
    """A modality that is observed or not."""
    flags = torch.stack(pair, dim=1).to(like.dtype)  # (B, 2)
    if value is None:
        return Entry(flags, *_nothing(modality, like))
    seen = flags[:, 1]
    channels = modality.observe(value).to(like.dtype) * seen[:, None, None, None]
    return Entry(flags, channels, modality.context(value).to(like.dtype) * seen[:, None])


def _noiseless(modality: Condition, gain: float, value: Tensor | None, observed: Tensor) -> Noisy:
    """A diffused modality that is observed or absent: its signal at time 0 or T."""
    share = 1.0 - observed.float()
    signal = share.new_zeros(len(share), *modality.signal_shape) if value is None else gain * modality.signal(value)
    return Noisy(signal, share)


def _diffused(modality: Condition, noisy: Noisy, aggregated: Tensor, like: Tensor) -> Entry:
    """A diffused modality. What is shown at time T is zero: its noise says nothing."""
    sample, share = noisy.sample.to(like.dtype), noisy.share.to(like.dtype)
    flags = torch.stack([aggregated.to(like.dtype), (share == 0).to(like.dtype)], dim=1)
    flags = torch.cat([flags, time_numbers(share)], dim=1)  # (B, 18)
    shown = sample * (share < 1).to(like.dtype).reshape(-1, *(1,) * (sample.ndim - 1))
    channels, context = _nothing(modality, like)
    return Entry(flags, shown, context) if modality.observation_channels else Entry(flags, channels, shown)


def _nothing(modality: Condition, like: Tensor) -> tuple[Tensor, Tensor]:
    channels = like.new_zeros(len(like), modality.observation_channels, *like.shape[2:])
    return channels, like.new_zeros(len(like), modality.context_width)


def width_of(modality: Condition, diffused: bool) -> int:
    """How many of the backbone's flags belong to a modality."""
    return 2 + TIME_NUMBERS * diffused + modality.context_width


def slots_of(entries: ModalitySlots, diffused: bool) -> list[Slot]:
    """The slots of these flags, for fine-tuning; those of times are new where the other model is not diffused."""
    times = slots(("time", k) for k in range(TIME_NUMBERS)) if diffused else []
    return [*slots(("aggregated", "observed")), *times, *entries.context]
