"""Rows generated on access, with the part of the interface of `datasets.Dataset` that the package uses."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import datasets

from mmdiff.errors import InputError


class MadeRows(Sequence):
    """Rows of one split; only the selected columns are generated.

    Args:
        rows: how many.
        types: {column: its `datasets` feature}.
    """

    def __init__(self, rows: int, types: Mapping[str, Any]) -> None:
        self._types, self._indices = dict(types), range(rows)
        self.column_names = list(types)

    @abstractmethod
    def make(self, row: int, names: list[str]) -> dict[str, Any]:
        """The named columns of a row, a function of the row's number alone."""

    @property
    def features(self) -> datasets.Features:
        """The types of the selected columns."""
        return datasets.Features({name: self._types[name] for name in self.column_names})

    def select_columns(self, column_names: str | list[str]) -> Self:
        """The same rows with some of the columns.

        Raises:
            InputError: for a column that is not there.
        """
        names = [column_names] if isinstance(column_names, str) else list(column_names)
        for name in names:
            if name not in self.column_names:
                raise InputError("column", name, f"the rows have {', '.join(self.column_names)}")
        return self._with(self._indices, names)

    def select(self, indices: Sequence[int]) -> Self:
        """Some of the rows, in the order of ``indices``."""
        return self._with([self._indices[index] for index in indices], self.column_names)

    def _with(self, indices: Sequence[int], column_names: list[str]) -> Self:
        chosen = object.__new__(type(self))
        chosen.__dict__ |= self.__dict__ | {"_indices": indices, "column_names": list(column_names)}
        return chosen

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.make(self._indices[operator.index(index)], self.column_names)  # IndexError outside
