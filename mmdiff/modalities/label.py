"""Class labels: E is a learned table with unit mean square, the head a categorical on the pooled features."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel
from torch import Generator, Tensor, nn

from mmdiff.errors import InputError
from mmdiff.likelihoods import categorical_log_prob, categorical_sample, mean_logits
from mmdiff.modalities.base import Modality, Shape
from mmdiff.modalities.heads import file_at, repeated, widened


class Label(Modality):
    """A class label; its value is an int64 class id.

    Args:
        shape: the surroundings, see `Modality`.
        num_classes: K; ids run from 0 to K − 1. Taken from the data where the config leaves it out.
        table_size: side of the table's own grid, repeated to the size of the diffusion space; convolutions find a
            coarse pattern in z_t, and subtract it, more easily. Default: the full size.
        names: of the classes, where the data have them.
        observe_as: how an observed label reaches the backbone: "channels" (its encoding) or "context" (one-hot).
    """

    def __init__(
        self,
        shape: Shape,
        num_classes: int,
        table_size: int | None = None,
        names: list[str] | None = None,
        observe_as: str = "channels",
    ) -> None:
        super().__init__(shape)
        if num_classes < 2:
            raise InputError("num_classes", num_classes, "a label needs at least two classes")
        channels, height, width = shape.space
        if table_size is not None and (table_size < 1 or height % table_size or width % table_size):
            raise InputError("table_size", table_size, f"must divide the diffusion space's {height}x{width}")
        if observe_as not in ("channels", "context"):
            raise InputError("observe_as", observe_as, "choose channels or context")
        self.by_context = observe_as == "context"
        if names is not None and len(names) != num_classes:
            raise InputError("names", names, f"needs {num_classes} entries, one per class")
        self.num_classes, self.names, self.height, self.width = num_classes, names, height, width
        rows, columns = (table_size or height, table_size or width)
        self.table = nn.Parameter(torch.randn(num_classes, channels, rows, columns))
        self.head = nn.Sequential(
            nn.LayerNorm(shape.pooled),
            nn.Linear(shape.pooled, shape.pooled),
            nn.SiLU(),
            nn.Linear(shape.pooled, num_classes),
        )

    @classmethod
    def settings_from_data(
        cls, feature: Any, values: Iterable[Any], num_classes: int | None = None, **_: Any
    ) -> dict[str, Any]:
        if isinstance(feature, ClassLabel) and num_classes in (None, feature.num_classes):
            return {"num_classes": feature.num_classes, "names": feature.names}
        if num_classes is not None:
            return {}
        largest = -1
        for value in values:  # a bare integer column does not state its size
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise InputError("label", type(value).__name__, "is no column of integers; check data.columns")
            largest = largest if value is None else max(largest, value)
        if largest < 0:
            raise InputError("label", "NoneType", "is no column of integers; check data.columns")
        return {"num_classes": largest + 1}

    def preprocess(self, raw: Any) -> Tensor:
        if isinstance(raw, bool) or not isinstance(raw, int):
            raise InputError("label", raw, "is no integer class id; check data.columns")
        if not 0 <= raw < self.num_classes:
            raise InputError("label", raw, f"is outside 0 … {self.num_classes - 1}; check num_classes")
        return torch.tensor(raw)

    def parse(self, text: str) -> int:
        """A class name, an id, or a .txt file that holds one of them."""
        if text.endswith(".txt") and text not in (self.names or ()):
            try:
                text = file_at("label", text).read_text().rstrip("\n")
            except UnicodeDecodeError:
                raise InputError("label", text, "is no text file; it should hold a class id or a name") from None
        if self.names and text in self.names:
            return self.names.index(text)
        try:
            return int(text)
        except ValueError:
            known = "".join(f", {name}" for name in (self.names or [])[:10])
            more = ", …" if len(self.names or []) > 10 else ""
            remedy = f"write a class id, 0 … {self.num_classes - 1}" + (
                f", or a name: {known[2:]}{more}" if known else ""
            )
            raise InputError("label", text, remedy) from None

    def save(self, shown: int, stem: Path) -> Path:
        """By its name where the classes have names."""
        return super().save(self.names[shown] if self.names else shown, stem)

    def check(self, value: Tensor) -> None:
        super().check(value)
        outside = value[(value < 0) | (value >= self.num_classes)]
        if len(outside):
            raise InputError("label", int(outside[0]), f"is outside 0 … {self.num_classes - 1}")

    def postprocess(self, value: Tensor) -> list[int]:
        return value.tolist()

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
        return repeated(self._normalised_table()[value], (self.height, self.width))

    @property
    def observation_channels(self) -> int:
        return 0 if self.by_context else super().observation_channels

    def observe(self, value: Tensor) -> Tensor:
        if self.by_context:
            return self.table.new_zeros(len(value), 0, self.height, self.width)
        return self.encode(value)

    @property
    def context_width(self) -> int:
        return self.num_classes if self.by_context else 0

    def context(self, value: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(value, self.num_classes) * math.sqrt(self.num_classes)  # unit scale per number
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
