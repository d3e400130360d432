"""Conditions that are asked a query: the context of another observed modality says what matters in them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mmdiff.errors import InputError, at
from mmdiff.modalities.base import Condition, Shape
from mmdiff.slots import Axes, Axis, of


class Asked(Condition):
    """A condition that takes a query (B, q), or zeros where nothing is asked.

    Args:
        shape: the surroundings; ``shape.query`` is q.
        query: the modality whose context is the query; None: this condition takes none.
    """

    #: The names in the state of weights (…, q) that read the query, for fine-tuning.
    query_weights: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shape: Shape, query: str | None) -> None:
        super().__init__(shape)
        self.query, self._question = query, None

    @property
    def query_dim(self) -> int:
        """q; built alone, as to read data, a condition has nobody to ask, and any width will do."""
        return self.shape.query or 1

    def asked(self, question: Tensor) -> Self:
        """The same condition, with the same weights, asked a query (B, q): for values (B, …)."""
        other = copy.copy(self)
        other._question = question
        return other

    def question(self, like: Tensor) -> Tensor | None:
        """The query (B, q) for values of this batch, dtype and device; None where the condition takes none."""
        if self.query is None:
            return None
        nothing = like.new_zeros(len(like), self.query_dim)
        return nothing if self._question is None else self._question.to(like)


Kinds = Mapping[str, tuple[type[Condition], Mapping[str, Any]]]  # {name: (class, settings)}


def built(kinds: Kinds, shape: Shape, anchor: str, observable: Collection[str]) -> dict[str, Condition]:
    """{name: modality} of a model, in the order of ``kinds``.

    Args:
        kinds: of all modalities.
        shape: of the model.
        anchor: the name of the one without a head.
        observable: names of the modalities that training may observe.

    Raises:
        InputError: as of the classes, and for a query that cannot be.
    """
    queries = _queries(kinds)
    modalities: dict[str, Condition] = {}
    for name in _in_turn(list(kinds), queries):
        kind, settings = kinds[name]
        with at(f"modalities.{name}"):
            own = _surroundings(shape, queries.get(name), modalities, observable)
            modalities[name] = kind(own, **{**settings, "head": False} if name == anchor else settings)
    return {name: modalities[name] for name in kinds}


def _queries(kinds: Kinds) -> dict[str, str]:
    """{modality: the one that it is asked the context of}."""
    asking = {name: settings.get("query") for name, (kind, settings) in kinds.items() if issubclass(kind, Asked)}
    queries = {name: other for name, other in asking.items() if other is not None}
    for name, other in queries.items():
        if other == name or other not in list(kinds):  # a saved config may hold anything
            choice = ", ".join(one for one in kinds if one != name)
            raise InputError(f"modalities.{name}.query", other, f"choose another modality: {choice}")
    return queries


def _in_turn(names: list[str], queries: Mapping[str, str]) -> list[str]:
    """The names in their order, but each after the one whose context it needs."""
    turn: list[str] = []
    while left := [name for name in names if name not in turn]:
        ready = [name for name in left if name not in queries or queries[name] in turn]
        if not ready:
            raise InputError(f"modalities.{left[0]}.query", queries[left[0]], "closes a circle of queries")
        turn += ready
    return turn


def _surroundings(
    shape: Shape, query: str | None, modalities: Mapping[str, Condition], observable: Collection[str]
) -> Shape:
    """With the width of the query's context."""
    if query is None:
        return shape
    width = modalities[query].context_width
    if not width:
        remedy = f"{type(modalities[query]).__name__} has no context; set observe_as: context there, or choose another"
        raise InputError("query", query, remedy)
    if query not in observable:
        raise InputError("query", query, "is never observed in training; raise states.observed there")
    return shape._replace(query=width)


def asked(
    modalities: Mapping[str, Condition], name: str, values: Mapping[str, Tensor], observed: Mapping[str, Tensor]
) -> Condition:
    """A modality, asked what the observed modality that its query names says; zeros where that is not observed.

    Args:
        modalities: of the model.
        name: of the modality.
        values: of at least the observed modalities.
        observed: {name: (B,) bool}; a missing name means False.
    """
    modality = modalities[name]
    other = modality.query if isinstance(modality, Asked) else None
    if other is None or other not in values or other not in observed:
        return modality
    context = asked(modalities, other, values, observed).context(values[other])  # (B, q)
    return modality.asked(torch.where(observed[other][:, None], context, 0.0))


def query_slots(modalities: Mapping[str, Condition], by_name: Collection[str]) -> dict[str, Axes]:
    """{name in the model's state: axes} of the weights that read a query; arguments as of `MTDiffusionModel.slots`."""
    axes: dict[str, Axes] = {}
    for name, modality in modalities.items():
        if isinstance(modality, Asked) and modality.query is not None:
            other = modalities[modality.query]
            context = of((modality.query, type(other)), other.slots(modality.query in by_name).context)
            axes |= {f"modalities.{name}.{weight}": {1: Axis(context)} for weight in modality.query_weights}
    return axes
