"""Real-valued maps (depth, normals, flow): standardised, E spreads their channels over the diffusion space's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Generator, Tensor
from torch.nn.functional import adaptive_avg_pool1d

from mmdiff.augmentation import NEAREST, Change, moved
from mmdiff.errors import InputError
from mmdiff.modalities.base import Shape
from mmdiff.modalities.diffusible import Diffusible
from mmdiff.modalities.files import as_array, check_numbers, of_file, open_array, open_image
from mmdiff.modalities.grids import Size, cells, check_size, grid_channels, grown, height_width, to_grid, to_space
from mmdiff.modalities.heads import GaussianHead, gaussian_nll, gaussian_sample
from mmdiff.modalities.pictures import SIXTEEN_BITS, one_size, resized

_ROWS = 2000  # that statistics are read from


class Dense(Diffusible):
    """A map of real numbers; its value is (channels, height, width) float32 in the data's own units, or in those that
    a subclass's `transform` brings them to; what a person sees is brought back by `inverse`.

    Raw values are arrays, .npy files or nested lists (h, w), (channels, h, w), or PIL images of mode F, I or I;16.

    Args:
        shape: the surroundings, see `Modality`.
        channels, size: taken from the data where the config leaves them out.
        mean, std: of the data, over all channels and pixels; read from the first rows where the config leaves them out.
        resize: bring maps of another size to `size` (centre crop to its shape, then bilinear) instead of refusing.
    """

    reads_images: ClassVar[bool] = True
    pixelwise: ClassVar[bool] = True

    def __init__(
        self,
        shape: Shape,
        channels: int,
        size: Size,
        mean: float = 0.0,
        std: float = 1.0,
        resize: bool = False,
    ) -> None:
        super().__init__(shape)
        if channels < 1:
            raise InputError("channels", channels, "needs at least one")
        if not std > 0:
            raise InputError("std", std, "must be positive; the column may be constant")
        self.channels, self.mean, self.std, self.resize = channels, mean, std, resize
        self.height, self.width = height_width(size)
        self.head = GaussianHead(shape, channels, (self.height, self.width))

    @classmethod
    def settings_from_data(cls, feature: Any, values: Iterable[Any], size: Any = None, **_: Any) -> dict[str, Any]:
        present = itertools.islice((value for value in values if value is not None), _ROWS)
        maps = [_finite(cls.transform(_finite(cls.read(value)))) for value in present]
        if not maps:
            raise InputError("dense", None, "the column is empty; check data.columns")
        numbers = np.concatenate([m.ravel() for m in maps]).astype(np.float64)
        settings = {"channels": len(maps[0]), "mean": float(numbers.mean()), "std": float(numbers.std())}
        return settings if size is not None else {**settings, "size": one_size("dense", {m.shape[1:] for m in maps})}

    @staticmethod
    def read(raw: Any) -> np.ndarray:
        """A raw value as an array (channels, h, w) in its own units."""
        raw = of_file("dense", raw)
        if isinstance(raw, PILImage.Image) and raw.mode not in ("F", "I", *SIXTEEN_BITS, "L"):
            raise InputError("dense", raw.mode, "is no map of numbers; store mode F, I or I;16, or an array")
        array = as_array(raw)
        if array.ndim not in (2, 3) or array.dtype.kind not in "iuf":
            raise InputError("dense", type(raw).__name__, "is no map of numbers (h, w) or (channels, h, w)")
        if array.ndim == 3 and array.shape[2] <= 4 < min(array.shape[:2]):
            raise InputError("dense", f"shape {array.shape}", "has its channels last; store (channels, h, w)")
        with np.errstate(over="ignore"):  # infinity is refused
            return array.astype(np.float32).reshape(-1, *array.shape[-2:])

    @staticmethod
    def transform(array: np.ndarray) -> np.ndarray:
        """Raw units -> those of values; a subclass may take a logarithm here, beside its `inverse`."""
        return array

    @staticmethod
    def inverse(array: np.ndarray) -> np.ndarray:
        """Units of values -> raw units: the inverse of `transform`."""
        return array

    @classmethod
    def check_readable(cls, raw: Any) -> None:
        _finite(cls.transform(_finite(cls.read(raw))))

    def preprocess(self, raw: Any) -> Tensor:
        array = _finite(self.read(raw))
        if len(array) != self.channels:
            raise InputError("dense", f"{len(array)} channels", f"expected {self.channels}")
        if not self.resize:
            check_size("dense", array.shape[1:], (self.height, self.width))
        return torch.from_numpy(_finite(self.transform(self._fitted(array))))

    def _fitted(self, array: np.ndarray) -> np.ndarray:
        """(channels, h, w) in raw units -> (channels, height, width); numbers stay in the range that they had."""
        if array.shape[1:] == (self.height, self.width):
            return array
        planes = [resized(PILImage.fromarray(p), self.width, self.height, PILImage.Resampling.BILINEAR) for p in array]
        return np.stack([np.asarray(plane) for plane in planes])

    def check_observed(self, value: Tensor) -> None:
        _finite(value)

    def parse(self, text: str) -> Any:
        """A .npy file or an image."""
        raw = open_array("dense", text) if text.endswith(".npy") else open_image("dense", text)
        array = _finite(Dense.read(raw))
        return raw if array.shape[1:] == (self.height, self.width) else self._fitted(array)

    def postprocess(self, value: Tensor) -> list[np.ndarray]:
        """In raw units."""
        return [self.inverse(array) for array in super().postprocess(value)]

    @property
    def value_shape(self) -> tuple[int, ...]:
        return self.channels, self.height, self.width

    def placeholder(self) -> Tensor:
        return torch.full(self.value_shape, self.mean)

    def follow(self, value: Tensor, change: Change) -> Tensor:
        """Numbers move and stay what they are; a subclass changes those that are parts of directions."""
        return moved(value, change, NEAREST)

    def examples(self, count: int, generator: Generator) -> Tensor:
        rows, columns, factor = cells((self.height, self.width), self.shape.space)
        return self.mean + self.std * grown(
            torch.randn(count, self.channels, rows, columns, generator=generator), factor
        )

    def _standardised(self, value: Tensor) -> Tensor:
        return (value - self.mean) / self.std

    def encode(self, value: Tensor) -> Tensor:
        return self._to_space(self._standardised(value))

    def _to_space(self, standardised: Tensor) -> Tensor:
        """Where channels are averaged, what that costs independent ones is given back."""
        shares = adaptive_avg_pool1d(torch.eye(self.channels), self.shape.space[0])  # (c, C), of channels in averages
        return to_space(standardised, self.shape.space) / float(shares.square().sum(dim=0).mean().sqrt())

    @property
    def observation_channels(self) -> int:
        return grid_channels(self.channels, (self.height, self.width), self.shape.space)

    def observe(self, value: Tensor) -> Tensor:
        return to_grid(self._standardised(value), self.shape.space)

    def decode(self, features: Tensor, pooled: Tensor) -> Tensor:
        """(B, channels + 1, height, width) of the standardised map: the mean, and log σ in the last channel."""
        return self.head(features, pooled)

    def nll(self, params: Tensor, value: Tensor) -> Tensor:
        """Of the value in its own units: log std is added to the standardised map's."""
        nll = gaussian_nll(params, self._standardised(value)).flatten(1).mean(dim=1)
        return nll + math.log(self.std)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        return self.mean + self.std * gaussian_sample(params, noise)

    def mode(self, params: Tensor) -> Tensor:
        return self.mean + self.std * params[:, :-1]

    def expected_encoding(self, params: Tensor) -> Tensor:
        return self._to_space(params[:, :-1])

    def expected_signal(self, params: Tensor) -> Tensor:
        return to_grid(params[:, :-1], self.shape.space)


def _finite(array: Any) -> Any:
    """A map whose numbers can be used, also when transformed."""
    check_numbers("dense", "a map", array)
    return array
