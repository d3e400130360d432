"""The contract of a modality: E_i, D_i and p_θ(x_i | z_t) of one data type in one class."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor, nn

from mmdiff.errors import InputError
from mmdiff.slots import ModalitySlots, slots


class Shape(NamedTuple):
    """What a modality must know of its surroundings."""

    space: tuple[int, int, int]  # (C, H, W) of the diffusion space
    features: int  # channels F of the backbone's feature map
    pooled: int  # width P of the backbone's pooled vector
    stride: int = 1  # s: the feature map is (B, F, H / s, W / s)


class KnownPart(NamedTuple):
    """What of z_0 is known: ``encoding`` (B, C, H, W), right where ``where`` (B, 1, H, W) bool is true."""

    encoding: Tensor
    where: Tensor


class Modality(nn.Module, ABC):
    """One data type: value <-> diffusion space, decoder head and likelihood.

    A *value* is the tensor that travels in a batch, *params* are what the head predicts: the parameters of
    p_θ(x_i | z_t). Encodings have mean square 1 over the data, so that a weight's `scale` means the same everywhere.
    In a model of half precision only `decode` computes in it: all else takes and gives float32.

    Args:
        shape: the diffusion space and the widths of the backbone's outputs.
    """

    #: Whether the modality may enter the mean of the forward process. One that lives in the anchor's own subspace may
    #: not: it is observed or absent (docs/theory.md, section 4).
    aggregable: ClassVar[bool] = True
    #: Whether the head predicts the anchor and not the modality's own value: its L2 term then counts where the modality
    #: is observed too.
    predicts_anchor: ClassVar[bool] = False
    #: Whether the model can give the modality. One that it cannot only conditions: no head, no L2 term (`Condition`).
    generated: ClassVar[bool] = True
    #: Whether raw values are images, so that a text column of their paths is read as the images.
    reads_images: ClassVar[bool] = False
    #: Whether an observed value fixes parts of the anchor, see `known_part`.
    fixes_anchor: ClassVar[bool] = False
    #: Names of the classes of a value, where it has classes and they have names.
    names: list[str] | None = None

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.register_state_dict_post_hook(_without_repeats)
        self.register_load_state_dict_pre_hook(_with_repeats)

    @staticmethod
    def diffusion_space(**settings: Any) -> tuple[int, int, int] | None:
        """The diffusion space (C, H, W) that this modality opens as an anchor, or None where it cannot be one."""
        return None

    @staticmethod
    def bounded(**settings: Any) -> bool:
        """Whether the encodings of an anchor lie in [−1, 1], so that sampling may clip the predicted z_0."""
        return False

    @property
    def frozen(self) -> nn.Module | None:
        """A network that the modality uses and never trains (an autoencoder); pipelines save it as a part of theirs."""
        return None

    def check_anchor(self, anchor: Modality) -> None:
        """Refuse an anchor that this modality does not go with."""

    def load_initial_weights(self) -> None:
        """Read pretrained weights that the settings name: once, where a run starts; a saved model has its own."""

    def slots(self, by_name: bool) -> ModalitySlots:
        """What fine-tuning takes from a modality of the same class with other settings.

        Args:
            by_name: whether classes are told apart by their names, which both have, or by their ids.
        """
        channels, width = self.observation_channels, self.context_width
        return ModalitySlots({}, slots((channels, k) for k in range(channels)), slots((width, k) for k in range(width)))

    # ------------------------------------------------------------------------------------------------ data <-> value

    @classmethod
    def settings_from_files(cls, **settings: Any) -> dict[str, Any]:
        """Constructor arguments that files named in the settings determine."""
        return {}

    @classmethod
    def settings_from_anchor(cls, **settings: Any) -> dict[str, Any]:
        """Constructor arguments that the anchor's resolved settings determine."""
        return {}

    @classmethod
    @abstractmethod
    def settings_from_data(cls, feature: Any, values: Iterable[Any], **settings: Any) -> dict[str, Any]:
        """Constructor arguments that a data column determines, beside those already set.

        Args:
            feature: the column's `datasets` feature.
            values: its values, read lazily.
            settings: what the config sets.
        """

    def is_missing(self, raw: Any) -> bool:
        """Whether a raw value says that there is none: None, NaN, or a set of which nothing is there."""
        if isinstance(raw, list):
            return all(item is None for item in raw)
        return raw is None or (isinstance(raw, numbers.Real) and raw != raw)

    @classmethod
    def check_readable(cls, raw: Any) -> None:
        """Refuse a raw value that `settings_from_data` could not read; for an image its header is enough.

        Raises:
            InputError: saying why.
        """

    @abstractmethod
    def preprocess(self, raw: Any) -> Tensor:
        """One raw value of a data set (a PIL image, an int …) -> value without batch dimension.

        Raises:
            InputError: when the raw value does not fit; the key is the modality's part of the message.
        """

    @abstractmethod
    def parse(self, text: str) -> Any:
        """A command line's text (a number, a name, the path of a file) -> raw value.

        Images of another size are cut to the centre and resized, whatever `resize` says: a person shows one file.

        Raises:
            InputError: when it cannot be read.
        """

    @abstractmethod
    def postprocess(self, value: Tensor) -> list[Any]:
        """Values (B, …) -> what a person wants: PIL images, class ids, vectors; a list of B."""

    def save(self, shown: Any, stem: Path) -> Path:
        """Write one of what `postprocess` gives as a file that `parse` reads back.

        Args:
            shown: the thing.
            stem: the file's path without its ending, which is added here.
        """
        path = stem.with_name(f"{stem.name}.txt")
        path.write_text(f"{shown}\n")
        return path

    def gallery(self) -> Tensor | None:
        """A few values, each worth a row of a sample grid, or None where none stand out: (R, *value_shape)."""
        return None

    @property
    @abstractmethod
    def value_shape(self) -> tuple[int, ...]:
        """Shape of one value; with `placeholder`'s dtype it describes rows whose value is missing."""

    @abstractmethod
    def placeholder(self) -> Tensor:
        """A valid value without meaning, for rows where it is missing."""

    @abstractmethod
    def examples(self, count: int, generator: Generator) -> Tensor:
        """Random valid values (count, *value_shape) with the statistics that E expects of the data."""

    def check(self, value: Tensor) -> None:
        """Refuse a batch of values (B, *value_shape) of another shape or dtype."""
        wanted = self.placeholder()
        kind_fits = value.dtype == wanted.dtype or (value.is_floating_point() and wanted.is_floating_point())
        if value.ndim == 0 or tuple(value.shape[1:]) != self.value_shape or not kind_fits:
            shown = f"{value.dtype} {tuple(value.shape)}"
            raise InputError(
                "value", shown, f"expected {wanted.dtype} of shape (B, {', '.join(map(str, self.value_shape))})"
            )

    def check_observed(self, value: Tensor) -> None:
        """Refuse observed values whose numbers lie where no data do; samples of the heads may lie there."""

    # -------------------------------------------------------------------------------------------- value -> diffusion

    @property
    def observation_channels(self) -> int:
        """Channels that `observe` adds to the backbone's input."""
        return self.shape.space[0]

    @property
    def context_width(self) -> int:
        """Numbers that `context` adds to the backbone's context vector."""
        return 0

    @abstractmethod
    def encode(self, value: Tensor) -> Tensor:
        """E_i(x_i): (B, C, H, W), mean square 1 over the data."""

    def observe(self, value: Tensor) -> Tensor:
        """What the backbone sees of an observed value: (B, observation_channels, H, W)."""
        return self.encode(value)

    def context(self, value: Tensor) -> Tensor:
        """What of an observed value has no place in space: (B, context_width), unit scale; it joins the state flags."""
        return value.new_zeros(len(value), 0)

    def weights(self, value: Tensor) -> Tensor | None:
        """How much each of several parts of an observed value matters, (B, n) with sum 1; None where it has no parts.

        The pipeline reports it.
        """
        return None

    # --------------------------------------------------------------------------------------------- diffusion -> value

    @abstractmethod
    def decode(self, features: Tensor, pooled: Tensor) -> Tensor:
        """D_i: the parameters of p_θ(x_i | z_t), one tensor, batch first, from features (B, F, H / s, W / s) and pooled
        (B, P)."""

    def target(self, value: Tensor, anchor: Tensor) -> Tensor:
        """What `nll` is asked about, from the modality's value and the anchor's: the value itself, or for a head that
        predicts the anchor whatever makes that a value of the modality."""
        return value

    @abstractmethod
    def nll(self, params: Tensor, value: Tensor) -> Tensor:
        """−log p_θ(x_i | z_t) in nats, averaged over the modality's own dimensions: (B,)."""

    def anchor_mode(self, params: Tensor) -> Tensor:
        """The likeliest value of the anchor, by a head that predicts it."""
        raise NotImplementedError

    def known_part(self, value: Tensor, anchor: Modality) -> KnownPart:
        """What an observed value fixes of z_0 in diffusion space, and where."""
        raise NotImplementedError

    def restore(self, anchor: Tensor, value: Tensor) -> Tensor:
        """The anchor's value with what an observed value fixes of it, bit-exactly: known pixels pasted back."""
        return anchor

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
        """Params of one law that stands for several about the same value, read at different noise levels."""
        return torch.stack(params).mean(dim=0)

    @abstractmethod
    def expected_encoding(self, params: Tensor) -> Tensor:
        """Σ_k p(k | z_t) E(k), the posterior mean of the encoding: (B, C, H, W)."""


def _repeats(modality: nn.Module) -> dict[str, str]:
    """{further name: first name} of tensors that have several, as those of tied modules."""
    first: dict[int, str] = {}
    every = (modality.named_parameters, modality.named_buffers)
    named = [(name, tensor) for names in every for name, tensor in names(remove_duplicate=False)]
    kept = {name: first.setdefault(id(tensor), name) for name, tensor in named}
    return {name: other for name, other in kept.items() if name != other}


def _without_repeats(modality: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state holds every tensor once: safetensors refuses a second name for one."""
    for name in _repeats(modality):
        state.pop(prefix + name, None)


def _with_repeats(modality: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state that is loaded gets the further names back."""
    for name, kept in _repeats(modality).items():
        if prefix + kept in state:
            state.setdefault(prefix + name, state[prefix + kept])


class Condition(Modality):
    """A modality that conditions and cannot be generated (a set of photos): observed or absent, never aggregated.

    It has no head and no likelihood, so nothing asks for what follows.
    """

    generated: ClassVar[bool] = False
    aggregable: ClassVar[bool] = False

    def decode(self, features: Tensor, pooled: Tensor) -> Tensor:
        raise NotImplementedError

    def nll(self, params: Tensor, value: Tensor) -> Tensor:
        raise NotImplementedError

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        raise NotImplementedError

    def mode(self, params: Tensor) -> Tensor:
        raise NotImplementedError

    def expected_encoding(self, params: Tensor) -> Tensor:
        raise NotImplementedError
