"""Columns of lists of which one item is a row's value: several captions of one image."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from mmdiff.randomness import uniform


def items_of(raw: object) -> list[Any]:
    """The items of a raw value that is a list; any other is one item."""
    return list(raw) if isinstance(raw, list | tuple) else [raw]


class OneOf:
    """Chooses the item of each visit: a function of (seed, sample number).

    Args:
        names: modalities whose column holds lists.
        is_missing: as of `mmdiff.data.table.Table`; missing items are never chosen.
        seed: of the run.
    """

    def __init__(self, names: Collection[str], is_missing: Mapping[str, Callable[[object], bool]], seed: int) -> None:
        self.names, self.is_missing, self.seed = frozenset(names), is_missing, seed

    def __bool__(self) -> bool:
        return bool(self.names)

    def of(self, samples: Sequence[int] | None) -> Callable[[str, int, object], object]:
        """(modality, place in the batch, raw value) -> its item, None where none is there.

        Args:
            samples: sample numbers in the run; None: the first item, always.
        """
        draws = {}
        if samples is not None:
            numbers = torch.as_tensor(samples, dtype=torch.int64)
            draws = {name: uniform(self.seed, 0, f"one_of/{name}", numbers).tolist() for name in self.names}

        def choose(name: str, place: int, raw: object) -> object:
            if name not in self.names:
                return raw
            missing = self.is_missing.get(name, lambda item: False)
            items = [item for item in items_of(raw) if item is not None and not missing(item)]
            draw = draws[name][place] if draws else 0.0
            return items[min(int(draw * len(items)), len(items) - 1)] if items else None  # the draw may round to 1

        return choose
