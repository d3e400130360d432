"""Random changes of training rows: a pure function of (seed, sample number). Modalities say what happens to values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mmdiff.augmentation import WHOLE, Change
from mmdiff.config import AugmentConfig, DataConfig
from mmdiff.errors import InputError, at
from mmdiff.randomness import uniform

Follow = Callable[[Tensor, Change], Tensor]
_COARSEST = 8  # rows and columns of a grid that crops need


class Follower(Protocol):
    """The part of a modality's contract that is used."""

    value_shape: tuple[int, ...]

    def follow(self, value: Tensor, change: Change) -> Tensor: ...

    def placeholder(self) -> Tensor: ...


class Augment:
    """Changes the rows of a batch, all modalities of a row alike.

    Args:
        config: how much of what.
        follow: {modality: (value, change) -> value}; other modalities stay as they are.
        seed: of the run.
    """

    def __init__(self, config: AugmentConfig, follow: Mapping[str, Follow], seed: int) -> None:
        self.config, self.follow, self.seed = config, dict(follow), seed

    def __call__(self, values: Mapping[str, Tensor], samples: Tensor) -> dict[str, Tensor]:
        """{modality: (B, …)} after the changes of these sample numbers (B,)."""
        changes = self.changes(samples, grid(values[name].shape[1:] for name in self.follow))
        followed = {
            name: torch.stack([follow(value, change) for value, change in zip(values[name], changes, strict=True)])
            for name, follow in self.follow.items()
        }
        return {**values, **followed}

    def changes(self, samples: Tensor, lines: tuple[int, int]) -> list[Change]:
        """The change of every sample; crops are cut on a `grid` of these (rows, columns)."""
        config = self.config
        flips = (self._draw(name, samples) < getattr(config, name) for name in ("flip", "vertical_flip"))
        names = ("brightness", "contrast", "saturation", "hue")
        colours = (_between(getattr(config, name), self._draw(name, samples)) for name in names)
        columns = (self._boxes(samples, *lines), *(column.tolist() for column in (*flips, *colours)))
        return [Change(*row) for row in zip(*columns, strict=True)]

    def _draw(self, name: str, samples: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        return uniform(self.seed, 0, f"augment/{name}", samples, shape)

    def _boxes(self, samples: Tensor, rows: int, columns: int) -> list[tuple[float, float, float, float]]:
        """Uniform area, log-uniform aspect, uniform place, as for Inception (Szegedy et al., arXiv 1409.4842)."""
        if self.config.crop == (1.0, 1.0):
            return [WHOLE] * len(samples)
        area, aspect, down, right = self._draw("crop", samples, (4,)).double().unbind(1)
        area = _between(self.config.crop, area)
        low, high = torch.tensor(self.config.crop_ratio, dtype=torch.float64).log()
        aspect = _between((low, high), aspect).exp()
        height = ((area / aspect).sqrt() * rows).round().clamp(1, rows)
        width = ((area * aspect).sqrt() * columns).round().clamp(1, columns)
        top, left = (down * (rows - height + 1)).floor(), (right * (columns - width + 1)).floor()
        boxes = torch.stack([top / rows, left / columns, height / rows, width / columns], dim=1)
        return [tuple(box) for box in boxes.tolist()]


def _between(ends: tuple[float | Tensor, float | Tensor], share: Tensor) -> Tensor:
    return ends[0] + (ends[1] - ends[0]) * share


def build_augment(data: DataConfig, modalities: Mapping[str, Follower], anchor: str, seed: int) -> Augment | None:
    """The changes of `data.augment`, tried on one value of every modality; None where nothing changes.

    Args:
        data: with its settings.
        modalities: of the model.
        anchor: the name of the diffused one.
        seed: of the run.

    Raises:
        InputError: for a change that a modality cannot follow, or that has no effect.
    """
    config, known = data.augment, ", ".join(sorted(modalities))
    for name in config.unchanged:
        if name not in modalities:
            raise InputError("data.augment.unchanged", name, f"names no modality; choose from {known}")
    if not (config.moves or config.colours):
        return None
    if anchor in config.unchanged and config.moves:
        raise InputError("data.augment.unchanged", anchor, "is the anchor: what moves, moves with it; leave it out")
    following = {n: one for n, one in modalities.items() if n not in {*config.unchanged, *data.masking}}
    rows, columns = grid(one.value_shape for one in following.values())
    if config.crop != (1.0, 1.0) and min(rows, columns) < _COARSEST:
        remedy = f"the sizes of the maps have only a grid of {rows}x{columns} in common; resize or leave out the coarse"
        raise InputError("data.augment.crop", config.crop, remedy)
    with at("data.augment"):
        _try_on(config, following)
    return Augment(config, {name: one.follow for name, one in following.items()}, seed)


def grid(shapes: Iterable[Sequence[int]]) -> tuple[int, int]:
    """(rows, columns) of the finest grid whose lines lie between pixels of every map among values of these shapes.

    A crop that is cut on its lines has whole pixels in maps of every size. Sets of images are left out.
    """
    maps = [shape[-2:] for shape in shapes if 2 <= len(shape) <= 3]
    return math.gcd(*(height for height, _ in maps)), math.gcd(*(width for _, width in maps))


def _try_on(config: AugmentConfig, following: Mapping[str, Follower]) -> None:
    """Refuse what cannot follow, and colours that no value has."""
    still = Change()._asdict()
    colours = {name: next(e for e in getattr(config, name) if e != still[name]) for name in config.colours}
    box = WHOLE if config.crop == (1.0, 1.0) else (0.0, 0.0, 0.5, 0.5)
    change = Change(box, config.flip > 0, config.vertical_flip > 0, **colours)
    for one in following.values():
        value = one.placeholder()
        after = one.follow(value, change)
        if (after.shape, after.dtype) != (value.shape, value.dtype):
            remedy = f"its method follow gives {after.dtype} {tuple(after.shape)}, expected {tuple(value.shape)}"
            raise InputError("unchanged", type(one).__name__, remedy)
    generator = torch.Generator().manual_seed(0)
    floats = {n: one for n, one in following.items() if one.placeholder().is_floating_point()}
    values = {n: torch.rand(one.value_shape, generator=generator) for n, one in floats.items()}
    for colour, factor in colours.items():
        change = Change(**{colour: factor})
        if all(torch.allclose(one.follow(values[n], change), values[n], atol=1e-5) for n, one in floats.items()):
            raise InputError(colour, getattr(config, colour), "no image has it (grey ones have none); leave it out")
