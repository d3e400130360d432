"""Labels of a tensor's entries, so that fine-tuning copies the entries with the same label from another model."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Slot(NamedTuple):
    """The label of one entry along a dimension of a tensor.

    ``key``: a class, a channel of a modality or a state flag; equal keys mean the same in two models. ``unit``: the
    scale of the input that the entry multiplies, if it depends on the model.
    """

    key: Hashable
    unit: float = 1.0


class Axis(NamedTuple):
    """The slots along one dimension; ``zero``: entries that the other model lacks start at 0, not at random."""

    slots: Sequence[Slot]
    zero: bool = False


Axes = Mapping[int, Axis]  # {dimension: axis}; other dimensions are copied whole


class ModalitySlots(NamedTuple):
    """Slots of a modality: ``state`` {name in the state dict: axes}, other tensors are copied whole; ``channels`` of
    `observe`; ``context``, the numbers of `context`."""

    state: dict[str, Axes]
    channels: list[Slot]
    context: list[Slot]


def slots(keys: Iterable[Hashable], unit: float = 1.0) -> list[Slot]:
    """One slot per key."""
    return [Slot(key, unit) for key in keys]


def parts(owned: Iterable[Slot], count: int) -> list[Slot]:
    """Every slot ``count`` times, in the order of a pixel unshuffle by √count."""
    return [Slot((slot.key, count, index), slot.unit) for slot in owned for index in range(count)]


def of(owner: Hashable, owned: Iterable[Slot]) -> list[Slot]:
    """The slots with their owner in the key."""
    return [Slot((owner, slot.key), slot.unit) for slot in owned]


class Match(NamedTuple):
    """Along one dimension: entry ``target[k]`` is ``source[k]`` times ``gain[k]``; ``new`` are entries of the target
    alone, ``left`` is the number of entries of the source alone."""

    target: list[int]
    source: list[int]
    gain: list[float]
    new: list[int]
    left: int


def matched(target: Sequence[Slot], source: Sequence[Slot]) -> Match:
    """Match the entries with the same key."""
    places = {slot.key: place for place, slot in enumerate(source)}
    both = [place for place, slot in enumerate(target) if slot.key in places]
    sources = [places[target[place].key] for place in both]
    gain = [source[other].unit / target[place].unit for place, other in zip(both, sources, strict=True)]
    new = [place for place, slot in enumerate(target) if slot.key not in places]
    return Match(both, sources, gain, new, len(source) - len(both))


class Taken(NamedTuple):
    """A composed tensor and a description of its parts; "" if all entries of both tensors match."""

    tensor: Tensor
    words: str


def take(target: Tensor, source: Tensor, axes: Axes, source_axes: Axes) -> Taken | None:
    """A copy of ``target`` with the matching entries of another model's tensor; None if nothing fits.

    Args:
        target: with its random start.
        source: of the other model.
        axes, source_axes: of the two tensors.
    """
    if target.ndim != source.ndim or axes.keys() != source_axes.keys():
        return None
    if any(target.shape[d] != source.shape[d] for d in range(target.ndim) if d not in axes):
        return None
    matches = {d: matched(axis.slots, source_axes[d].slots) for d, axis in axes.items()}
    if not all(match.target for match in matches.values()):
        return None
    result = target.detach().cpu().clone()
    for dim, match in matches.items():
        if axes[dim].zero and match.new:
            result.index_fill_(dim, torch.tensor(match.new), 0.0)
        gain = torch.tensor(match.gain).reshape(-1, *(1,) * (target.ndim - dim - 1))
        source = source.index_select(dim, torch.tensor(match.source)) * gain
    places = [torch.tensor(matches[d].target) if d in matches else torch.arange(n) for d, n in enumerate(target.shape)]
    result[torch.meshgrid(*places, indexing="ij") if places else ...] = source.to(result)
    return Taken(result, "; ".join(_words(dim, match) for dim, match in matches.items() if match.new or match.left))


def _words(dim: int, match: Match) -> str:
    counts = {"taken": len(match.target), "new": len(match.new), "left out": match.left}
    return f"{('rows', 'inputs')[dim > 0]}: " + ", ".join(f"{n} {word}" for word, n in counts.items() if n)
