"""What the entries of a tensor belong to, so that another model's entries are taken where they mean the same."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Slot(NamedTuple):
    """What one entry along a dimension of a tensor belongs to.

    ``key``: a class, a channel of a modality, a state flag; equal keys mean the same in two models. ``unit``: the size
    of the input that the entry multiplies, where it depends on the model.
    """

    key: Hashable
    unit: float = 1.0


class Axis(NamedTuple):
    """The slots along one dimension, and whether an entry that the other model lacks starts at 0, not as drawn."""

    slots: Sequence[Slot]
    zero: bool = False


Axes = Mapping[int, Axis]  # {dimension: axis}; other dimensions are taken whole


class ModalitySlots(NamedTuple):
    """What entries of a modality belong to: ``state`` {name in the state dict: axes}, where a tensor is not named it
    is taken whole; ``channels`` of `observe`; ``context``, the numbers of `context`."""

    state: dict[str, Axes]
    channels: list[Slot]
    context: list[Slot]


def slots(keys: Iterable[Hashable], unit: float = 1.0) -> list[Slot]:
    """One slot per key."""
    return [Slot(key, unit) for key in keys]


def parts(found: Iterable[Slot], count: int) -> list[Slot]:
    """Every slot ``count`` times in a row, as a pixel unshuffle by √count splits channels."""
    return [Slot((slot.key, count, index), slot.unit) for slot in found for index in range(count)]


def of(owner: Hashable, found: Iterable[Slot]) -> list[Slot]:
    """Slots of one owner among those of several."""
    return [Slot((owner, slot.key), slot.unit) for slot in found]


class Match(NamedTuple):
    """Along one dimension: entry ``own[k]`` is taken from ``found[k]`` times ``gain[k]``; ``new`` and ``left`` are the
    entries that only one of the two has."""

    own: list[int]
    found: list[int]
    gain: list[float]
    new: list[int]
    left: int


def matched(own: Sequence[Slot], found: Sequence[Slot]) -> Match:
    """Entries of the same key."""
    places = {slot.key: place for place, slot in enumerate(found)}
    both = [place for place, slot in enumerate(own) if slot.key in places]
    sources = [places[own[place].key] for place in both]
    gain = [found[source].unit / own[place].unit for place, source in zip(both, sources, strict=True)]
    new = [place for place, slot in enumerate(own) if slot.key not in places]
    return Match(both, sources, gain, new, len(found) - len(both))


class Taken(NamedTuple):
    """A tensor that was put together, and in words what of it was taken: "" where all of both is used."""

    tensor: Tensor
    words: str


def take(own: Tensor, found: Tensor, axes: Axes, found_axes: Axes) -> Taken | None:
    """What fits of another model's tensor, put into one's own; None where nothing fits.

    Args:
        own: as it was drawn; stays as it is.
        found: of the other model.
        axes, found_axes: of both.
    """
    if own.ndim != found.ndim or axes.keys() != found_axes.keys():
        return None
    if any(own.shape[d] != found.shape[d] for d in range(own.ndim) if d not in axes):
        return None
    matches = {d: matched(axis.slots, found_axes[d].slots) for d, axis in axes.items()}
    if not all(match.own for match in matches.values()):
        return None
    result = own.detach().cpu().clone()
    for dim, match in matches.items():
        if axes[dim].zero and match.new:
            result.index_fill_(dim, torch.tensor(match.new), 0.0)
        gain = torch.tensor(match.gain).reshape(-1, *(1,) * (own.ndim - dim - 1))
        found = found.index_select(dim, torch.tensor(match.found)) * gain
    places = [torch.tensor(matches[d].own) if d in matches else torch.arange(own.shape[d]) for d in range(own.ndim)]
    result[torch.meshgrid(*places, indexing="ij") if places else ...] = found.to(result)
    return Taken(result, "; ".join(_words(dim, match) for dim, match in matches.items() if match.new or match.left))


def _words(dim: int, match: Match) -> str:
    counts = {"taken": len(match.own), "new": len(match.new), "left out": match.left}
    return f"{('rows', 'inputs')[dim > 0]}: " + ", ".join(f"{n} {word}" for word, n in counts.items() if n)
