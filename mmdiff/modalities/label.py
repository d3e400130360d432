"""Class labels: E is a learned table with unit mean square, the head a categorical on the pooled features."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mmdiff.errors import InputError
from mmdiff.likelihoods import categorical_log_prob, categorical_sample, mean_logits
from mmdiff.modalities.base import ONLY_ALL_ROWS, Modality, Shape
from mmdiff.modalities.classes import check_names, classes_of, counted, listed, whole_number
from mmdiff.modalities.files import file_at
from mmdiff.modalities.grids import repeatable, repeated
from mmdiff.modalities.heads import widened
from mmdiff.slots import Axis, ModalitySlots, slots

Raw = int | float | str


class Label(Modality):
    """A class label; its value is an int64 class, 0 … K − 1.

    Raw values are ids, names or whole floats. None, NaN and the values of `unknown` mean that the label is missing.

    Args:
        shape: the surroundings, see `Modality`.
        num_classes: K.
        table_size: side of a class's pattern, repeated to the size of the diffusion space. A coarse pattern is easier
            for convolutions to find in z_t and to subtract. Default: the full size.
        names: of the classes. Default: those of the data.
        observe_as: how an observed label reaches the backbone: "channels" (its encoding) or "context" (one-hot).
        unknown: the raw value, or values, of a missing label. Default: −1 of a `ClassLabel`.
        classes: "all" ids from 0 to the largest, or "compact": only those that occur.
        ids: the raw ids of the classes, if they are not 0 … K − 1; `compact` reads them from the data.
        show: what samples are: "id" or "name". Default: "name" if the data are texts, else "id".
    """

    def __init__(
        self,
        shape: Shape,
        num_classes: int,
        table_size: int | None = None,
        names: list[str] | None = None,
        observe_as: str = "channels",
        unknown: Raw | list[Raw] | None = None,
        classes: str = "all",
        ids: list[int] | None = None,
        show: str = "id",
    ) -> None:
        super().__init__(shape)
        if num_classes < 2:
            raise InputError("num_classes", num_classes, "a label needs at least two classes")
        channels, height, width = shape.space
        rows, columns = repeatable("table_size", table_size, shape.space)
        _check_choices(observe_as, classes, show, names)
        check_names(names, num_classes)
        if ids is not None and len({*map(whole_number, ids)} - {None}) != num_classes:
            raise InputError("ids", ids, f"needs {num_classes} different whole numbers, one per class")
        self.by_context, self.by_name = observe_as == "context", show == "name"
        self.unknown = unknown if isinstance(unknown, list | tuple) else [unknown]
        self.ids = list(ids or range(num_classes))
        self.num_classes, self.names, self.height, self.width = num_classes, names, height, width
        self.table = nn.Parameter(torch.randn(num_classes, channels, rows, columns))
        self.head = nn.Sequential(
            nn.LayerNorm(shape.pooled),
            nn.Linear(shape.pooled, shape.pooled),
            nn.SiLU(),
            nn.Linear(shape.pooled, num_classes),
        )

    def slots(self, by_name: bool) -> ModalitySlots:
        keys = self.names if by_name else self.ids
        axes, last = {0: Axis(slots(keys))}, f"head.{len(self.head) - 1}"
        own = super().slots(by_name)._replace(state=dict.fromkeys(("table", f"{last}.weight", f"{last}.bias"), axes))
        return own._replace(context=slots(keys, self._unit)) if self.by_context else own

    @classmethod
    def settings_from_files(cls, names: list[str] | None = None, **_: Any) -> dict[str, Any]:
        return {} if names is None else {"num_classes": len(names)}

    @classmethod
    def settings_from_data(
        cls,
        feature: Any,
        values: Iterable[Any],
        num_classes: int | None = None,
        names: list[str] | None = None,
        unknown: Raw | list[Raw] | None = None,
        classes: str = "all",
        **_: Any,
    ) -> dict[str, Any]:
        """A number of classes that the config sets is trusted: the column is not searched for classes without rows."""
        declared, settings = None, {}
        if _is_class_label(feature):
            declared, settings = feature.names, {} if unknown is not None else {"unknown": -1}
            unknown = -1 if unknown is None else unknown
        if num_classes is not None and classes != "compact" and _is_of_ids(feature):
            same = declared is not None and names is None and len(declared) == num_classes
            return {**settings, "names": declared} if same else settings
        absent = unknown if isinstance(unknown, list | tuple) else [unknown]
        counts = counted("label", (value for value in values if not _is_unknown(value, absent)))
        return settings | classes_of(counts, names or declared, num_classes, compact=classes == "compact")

    @classmethod
    def settings_from_stream(
        cls,
        feature: Any,
        num_classes: int | None = None,
        names: list[str] | None = None,
        classes: str = "all",
        **_: Any,
    ) -> dict[str, Any]:
        if classes == "compact":
            raise InputError("classes", classes, "needs all rows, and these are streamed; set ids and num_classes")
        if num_classes is None and _is_class_label(feature):
            return {"num_classes": len(feature.names)}
        if names is None and not _is_of_ids(feature):
            raise InputError("names", None, ONLY_ALL_ROWS)
        if num_classes is None:
            raise InputError("num_classes", None, ONLY_ALL_ROWS)
        return {}

    def is_missing(self, raw: Any) -> bool:
        return super().is_missing(raw) or _is_unknown(raw, self.unknown)

    def preprocess(self, raw: Any) -> Tensor:
        if isinstance(raw, str) and self.names is not None:
            return torch.tensor(self._named(raw))
        number = raw if isinstance(raw, bool) and self.names == ["false", "true"] else whole_number(raw)
        if number is None:
            raise InputError("label", raw, "is no integer class id; check data.columns")
        if number not in self.ids or _is_unknown(raw, self.unknown):
            raise InputError("label", raw, self._remedy(raw))
        return torch.tensor(self.ids.index(number))

    def _named(self, name: str) -> int:
        if name not in (self.names or []):
            raise InputError("label", name, f"is no class; write a name: {listed(self.names or [])}")
        return self.names.index(name)

    def _remedy(self, raw: Any) -> str:
        if _is_unknown(raw, self.unknown):
            return "means that the label is unknown; leave it out"
        plain = self.ids == list(range(self.num_classes))
        classes = f"outside 0 … {self.num_classes - 1}" if plain else f"none of {listed(self.ids)}"
        return f"is {classes}; check num_classes, or set unknown: {raw} where it means missing"

    def parse(self, text: str) -> int:
        """A class name, an id, or a .txt file that holds one of them."""
        if text.endswith(".txt") and text not in (self.names or ()):
            try:
                text = file_at("label", text).read_text().rstrip("\n")
            except UnicodeDecodeError:
                raise InputError("label", text, "is no text file; it should hold a class id or a name") from None
        if self.names and text in self.names:
            return self.ids[self.names.index(text)]
        try:
            return int(text)
        except ValueError:
            remedy = f"write a class id, {self._span()}" + (f", or a name: {listed(self.names)}" if self.names else "")
            raise InputError("label", text, remedy) from None

    def _span(self) -> str:
        plain = self.ids == list(range(self.num_classes))
        return f"0 … {self.num_classes - 1}" if plain else listed(self.ids)

    def save(self, output: Any, stem: Path) -> Path:
        """By its name where the classes have names."""
        return super().save(self.names[int(self.preprocess(output))] if self.names else output, stem)

    def check(self, value: Tensor) -> None:
        super().check(value)
        outside = value[(value < 0) | (value >= self.num_classes)]
        if len(outside):
            raise InputError("label", int(outside[0]), f"is outside 0 … {self.num_classes - 1}")

    def postprocess(self, value: Tensor) -> list[int] | list[str]:
        """Ids as the data have them, or names."""
        outputs = self.names if self.by_name else self.ids
        return [outputs[k] for k in value.tolist()]

    def gallery(self) -> Tensor:
        return torch.arange(min(self.num_classes, 10))

    @property
    def value_shape(self) -> tuple[int, ...]:
        return ()

    def placeholder(self) -> Tensor:
        return torch.tensor(0)

    def examples(self, count: int, generator: Generator) -> Tensor:
        return torch.randint(self.num_classes, (count,), generator=generator)

    def _normalised_table(self) -> Tensor:
        """(K, C, rows, columns), mean square 1 each: a learned encoder cannot shrink the noise loss by growing."""
        table = widened(self.table)
        return table / table.square().mean(dim=(1, 2, 3), keepdim=True).add(1e-12).sqrt()

    def encode(self, value: Tensor) -> Tensor:
        return self.fixed_encoder()(value)

    def fixed_encoder(self) -> Callable[[Tensor], Tensor]:
        table = self._normalised_table()
        return lambda value: repeated(table[value], (self.height, self.width))

    @property
    def observation_channels(self) -> int:
        return 0 if self.by_context else super().observation_channels

    @property
    def context_width(self) -> int:
        return self.num_classes if self.by_context else 0

    @property
    def _unit(self) -> float:
        """Of a one-hot vector whose numbers have unit scale."""
        return math.sqrt(self.num_classes)

    def context(self, value: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(value, self.num_classes) * self._unit
        return one_hot[:, : self.context_width].to(self.table.dtype)

    def decode(self, features: Tensor, pooled: Tensor) -> Tensor:
        return self.head(pooled)  # (B, K)

    def nll(self, params: Tensor, value: Tensor) -> Tensor:
        return -categorical_log_prob(params, value)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (1,)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        return categorical_sample(params, noise[:, 0])

    def mode(self, params: Tensor) -> Tensor:
        return params.argmax(dim=-1)

    def average(self, params: list[Tensor]) -> Tensor:
        """Of the probabilities."""
        return mean_logits(params)

    def expected_encoding(self, params: Tensor) -> Tensor:
        mean = torch.einsum("bk,kcij->bcij", params.softmax(dim=-1), self._normalised_table())
        return repeated(mean, (self.height, self.width))


def _check_choices(observe_as: str, classes: str, show: str, names: list[str] | None) -> None:
    for key, chosen, known in (
        ("observe_as", observe_as, ("channels", "context")),
        ("classes", classes, ("all", "compact")),
        ("show", show, ("id", "name")),
    ):
        if chosen not in known:
            raise InputError(key, chosen, f"choose {' or '.join(known)}")
    if show == "name" and names is None:
        raise InputError("show", show, "the classes have no names; set names")


def _is_unknown(raw: Any, unknown: Iterable[Raw | None]) -> bool:
    """Whether a raw value is None, NaN or one that means missing; 1 is not true."""
    if raw is None or raw != raw:
        return True
    return any(type(raw) is type(one) and raw == one or _same_number(raw, one) for one in unknown)


def _same_number(raw: Any, one: Any) -> bool:
    return whole_number(raw) is not None and whole_number(raw) == whole_number(one)


def _is_of_ids(feature: Any) -> bool:
    """Whether a column is known to hold numbers."""
    return _is_class_label(feature) or str(getattr(feature, "dtype", "string")).startswith(("int", "uint"))


def _is_class_label(feature: Any) -> bool:
    """Of `datasets`, which takes half a second to import and is imported already where a column is one of its."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(feature, datasets.ClassLabel)
