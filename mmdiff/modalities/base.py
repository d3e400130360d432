"""The contracts of a modality: `Value` is read and saved, `Condition` enters diffusion space, `Modality` leaves it."""

from __future__ import annotations

import copy
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Generator, Tensor

from mmdiff.augmentation import Change
from mmdiff.errors import InputError
from mmdiff.modalities.files import open_file, save_file
from mmdiff.modalities.grids import scaled
from mmdiff.modalities.tied import TiedState
from mmdiff.slots import ModalitySlots, slots

ONLY_ALL_ROWS = "is read off all rows, and of streamed rows only the first are looked at; set it"


class Shape(NamedTuple):
    """What a modality must know of its surroundings."""

    space: tuple[int, int, int]  # (C, H, W) of the diffusion space
    features: int  # channels F of the backbone's feature map
    pooled: int  # width P of the backbone's pooled vector
    stride: int = 1  # s: the feature map is (B, F, H / s, W / s)
    query: int = 0  # numbers of the query that this modality is asked, see `Asked`


class Value(ABC):
    """How a value is read, checked, shown and saved.

    A *raw value* is what the data hold (a PIL image, an int …). A *value* is the tensor that travels in a batch.
    """

    #: Whether raw values are images, so that a text column of their paths is read as the images.
    reads_images: ClassVar[bool] = False
    #: Whether values are images (1 or 3, height, width) in [−1, 1], which `mmdiff encode` writes as image files.
    are_images: ClassVar[bool] = False
    #: Settings that change nothing of what `preprocess` gives: encoded values can be used with others.
    free_settings: ClassVar[frozenset[str]] = frozenset()
    #: Names of the classes of a value, where it has classes and they have names.
    names: list[str] | None = None

    @classmethod
    def settings_from_files(cls, **settings: Any) -> dict[str, Any]:
        """Constructor arguments that files named in the settings determine."""
        return {}

    @classmethod
    def settings_from_anchor(cls, **settings: Any) -> dict[str, Any]:
        """Constructor arguments that the anchor's resolved settings determine."""
        return {}

    @classmethod
    def settings_from_data(cls, feature: Any, values: Iterable[Any], **settings: Any) -> dict[str, Any]:
        """Constructor arguments that a data column determines, beside those already set.

        Args:
            feature: the column's `datasets` feature.
            values: its values, read lazily.
            settings: what the config sets.
        """
        return {}

    @classmethod
    def settings_from_stream(cls, feature: Any, **settings: Any) -> dict[str, Any]:
        """Constructor arguments that otherwise all rows determine, of a column whose first rows alone are looked at.

        `settings_from_data` is called with the first rows then; arguments as there.

        Raises:
            InputError: naming the setting that the config must hold.
        """
        return {}

    @classmethod  # noqa: B027 (by default all is readable)
    def check_readable(cls, raw: Any) -> None:
        """Refuse a raw value that `settings_from_data` could not read; for an image its header is enough.

        Raises:
            InputError: saying why.
        """

    def size_of(self, raw: Any) -> tuple[int, int] | None:
        """(height, width) of a raw value, from its header; None of one without a size of its own."""
        return None

    def is_missing(self, raw: Any) -> bool:
        """Whether a raw value says that there is none: None, NaN, or a set of which nothing is there."""
        if isinstance(raw, list):
            return all(item is None for item in raw)
        return raw is None or (isinstance(raw, numbers.Real) and raw != raw)

    @abstractmethod
    def preprocess(self, raw: Any) -> Tensor:
        """One raw value -> value without batch dimension.

        Raises:
            InputError: when the raw value does not fit; the key is the modality's part of the message.
        """

    def postprocess(self, value: Tensor) -> list[Any]:
        """Values (B, …) -> what a person wants: PIL images, class ids, vectors; a list of B. By default arrays."""
        return list(value.detach().float().cpu().numpy())

    def parse(self, text: str) -> Any:
        """A command line's text -> raw value. By default a file that `save` has written, or else the text.

        Images of another size are cut to the centre and resized, whatever `resize` says: a person shows one file.

        Raises:
            InputError: when it cannot be read.
        """
        return open_file(type(self).__name__, text)

    def save(self, output: Any, stem: Path) -> Path:
        """Write one of what `postprocess` gives as a file that `parse` reads back. By default .png, .npy or .txt.

        Args:
            output: the thing.
            stem: the file's path without its ending, which is added here.
        """
        return save_file(output, stem)

    @property
    @abstractmethod
    def value_shape(self) -> tuple[int, ...]:
        """Shape of one value; with `placeholder`'s dtype it describes rows whose value is missing."""

    def placeholder(self) -> Tensor:
        """A valid value without meaning, for rows where it is missing. By default zeros."""
        return torch.zeros(self.value_shape)

    @abstractmethod
    def examples(self, count: int, generator: Generator) -> Tensor:
        """Random valid values (count, *value_shape) with the statistics that E expects of the data."""

    def follow(self, value: Tensor, change: Change) -> Tensor:
        """A value (*value_shape) after a change of its row. By default a number or a vector stays what it is.

        Override it where a value has a place in space, and where it means another thing after a flip ("left").

        Raises:
            InputError: this value cannot follow.
        """
        if len(self.value_shape) > 1:
            remedy = "does not say how it follows a change (its method follow); name the modality here to leave it"
            raise InputError("unchanged", type(self).__name__, remedy)
        return value

    def gallery(self) -> Tensor | None:
        """A few values, each worth a row of a sample grid, or None where none stand out: (R, *value_shape)."""
        return None

    def check(self, value: Tensor) -> None:
        """Refuse a batch of values (B, *value_shape) of another shape or dtype."""
        wanted = self.placeholder()
        kind_fits = value.dtype == wanted.dtype or (value.is_floating_point() and wanted.is_floating_point())
        if value.ndim == 0 or tuple(value.shape[1:]) != self.value_shape or not kind_fits:
            actual = f"{value.dtype} {tuple(value.shape)}"
            raise InputError(
                "value", actual, f"expected {wanted.dtype} of shape (B, {', '.join(map(str, self.value_shape))})"
            )

    def check_observed(self, value: Tensor) -> None:  # noqa: B027 (all is allowed by default)
        """Refuse observed values whose numbers lie where no data do; samples of the heads may lie there."""


class Condition(Value, TiedState):
    """How a value enters diffusion space. A class that only derives from this one is observed or absent.

    Encodings have mean square 1 over the data, so that a weight's `scale` means the same everywhere. They are float32,
    in a model of half precision too.

    Args:
        shape: the diffusion space and the widths of the backbone's outputs.
    """

    #: Whether the encoding may enter the mean of the forward process (docs/theory.md, section 4).
    aggregable: ClassVar[bool] = False

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def encode(self, value: Tensor) -> Tensor:
        """E_i(x_i): (B, C, H, W), mean square 1 over the data."""

    def in_space(self, height: int, width: int) -> Self:
        """The same modality, with the same weights, in a diffusion space of another height and width.

        Its attributes ``height`` and ``width``, if it has them, grow along.

        Raises:
            InputError: for a size that is not whole then.
        """
        other = copy.copy(self)
        channels, *before = self.shape.space
        other.shape = self.shape._replace(space=(channels, height, width))
        if hasattr(self, "height"):
            other.height, other.width = scaled((self.height, self.width), (before[0], before[1]), (height, width))
        return other

    def fixed_encoder(self) -> Callable[[Tensor], Tensor]:
        """`encode`, for many calls while the weights stay fixed: what depends on them alone is computed once."""
        return self.encode

    @property
    def observation_channels(self) -> int:
        """Channels that `observe` adds to the backbone's input."""
        return self.shape.space[0]

    def observe(self, value: Tensor) -> Tensor:
        """What the backbone sees of an observed value: (B, observation_channels, H, W)."""
        if self.observation_channels:
            return self.encode(value)
        return torch.zeros(len(value), 0, *self.shape.space[1:], device=value.device)

    @property
    def context_width(self) -> int:
        """Numbers that `context` adds to the backbone's context vector."""
        return 0

    def context(self, value: Tensor) -> Tensor:
        """What of an observed value has no place in space: (B, context_width), unit scale; it joins the state flags."""
        return value.new_zeros(len(value), 0)

    def weights(self, value: Tensor) -> Tensor | None:
        """How much each of several parts of an observed value matters, (B, n) with sum 1; None where it has no parts.

        The pipeline reports it.
        """
        return None

    def load_initial_weights(self) -> None:
        """Read pretrained weights that the settings name: once, where a run starts; a saved model has its own."""

    def slots(self, by_name: bool) -> ModalitySlots:
        """What fine-tuning takes from a modality of the same class with other settings.

        Args:
            by_name: whether classes are told apart by their names, which both have, or by their ids.
        """
        channels, width = self.observation_channels, self.context_width
        return ModalitySlots({}, slots((channels, k) for k in range(channels)), slots((width, k) for k in range(width)))


class Modality(Condition):
    """How a value leaves diffusion space: a head reads it from z_t.

    *Params* are what the head predicts: the parameters of p_θ(x_i | z_t), one tensor, batch first. In a model of half
    precision only `decode` computes in it.
    """

    aggregable: ClassVar[bool] = True

    @abstractmethod
    def decode(self, features: Tensor, pooled: Tensor) -> Tensor:
        """D_i: features (B, F, H / s, W / s) and pooled (B, P) -> params."""

    @abstractmethod
    def nll(self, params: Tensor, value: Tensor) -> Tensor:
        """−log p_θ(x_i | z_t) in nats, averaged over the modality's own dimensions: (B,)."""

    @property
    def dimensions(self) -> int:
        """The number of dimensions that `nll` averages over: nll × dimensions is the whole in nats."""
        return math.prod(self.value_shape)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape, without batch, of the standard normal noise that `sample` turns into a value."""
        return self.value_shape

    @abstractmethod
    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """A draw x̂_i ~ p_θ(x_i | z_t) from per-sample noise (B, *noise_shape), so that a batch can be split."""

    @abstractmethod
    def mode(self, params: Tensor) -> Tensor:
        """argmax p_θ(x_i | z_t)."""

    def average(self, params: list[Tensor]) -> Tensor:
        """Params of one distribution for several of the same value, read at different noise levels."""
        return torch.stack(params).mean(dim=0)

    def expected_encoding(self, params: Tensor) -> Tensor:
        """Σ_k p(k | z_t) E(k), the posterior mean of the encoding: (B, C, H, W).

        By default E of the mode, which is right where E is affine and the mode is the mean.
        """
        return self.encode(self.mode(params))
