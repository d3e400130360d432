"""Images in pixel space: the usual anchor, E = identity up to a scale; as an auxiliary, a Gaussian head."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor, nn

from mmdiff.errors import InputError
from mmdiff.modalities.base import Modality, Shape

_MODES = {1: "L", 3: "RGB"}
_GREY = ("1", "L", "I;16")
_COLOUR = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "LA", "La", "CMYK", "YCbCr", "LAB", "HSV")  # become RGB


class Image(Modality):
    """An image; its value is (channels, size, size) float32 in [−1, 1].

    Args:
        shape: the surroundings, see `Modality`.
        channels: 1 (grey) or 3 (RGB). Taken from the data where the config leaves it out.
        size: (height, width) in pixels, or one number for both. Taken from the data where the config leaves it out.
        resize: bring images of another size to `size` (centre crop to its shape, then bicubic) instead of refusing.
        scale: E(x) = scale · x; 1 for an anchor, 1/rms of the data for an aggregated image.
        head: whether a Gaussian head is built; the anchor needs none, the backbone's prediction is its own.
    """

    def __init__(
        self,
        shape: Shape,
        channels: int,
        size: int | tuple[int, int] | list[int],
        resize: bool = False,
        scale: float = 1.0,
        head: bool = True,
    ) -> None:
        super().__init__(shape)
        height, width = (size, size) if isinstance(size, int) else size
        if channels not in _MODES:
            raise InputError("channels", channels, "an image has 1 (grey) or 3 (RGB) channels")
        if (channels, height, width) != tuple(shape.space):
            raise InputError(
                "size", (channels, height, width), f"differs from the diffusion space {tuple(shape.space)}"
            )
        self.channels, self.height, self.width = channels, height, width
        self.resize, self.scale = resize, scale
        self.head = nn.Conv2d(shape.features, channels, 3, padding=1) if head else None
        self.log_std = nn.Linear(shape.pooled, 1) if head else None

    @staticmethod
    def space(channels: int, size: int | tuple[int, int] | list[int], **_: Any) -> tuple[int, int, int]:
        """The diffusion space that an anchor with these settings opens: (C, H, W)."""
        height, width = (size, size) if isinstance(size, int) else size
        return channels, height, width

    @classmethod
    def settings_from_data(cls, feature: Any, values: Iterable[Any]) -> dict[str, Any]:
        example = next((value for value in values if value is not None), None)
        if not isinstance(example, PILImage.Image):
            raise InputError("image", type(example).__name__, "is no image column; check data.columns")
        channels = _channels(example.mode)
        return {"channels": channels, "size": [example.height, example.width]}

    def preprocess(self, raw: Any) -> Tensor:
        if not isinstance(raw, PILImage.Image):
            raise InputError("image", type(raw).__name__, "is no image; check data.columns")
        if _channels(raw.mode) != self.channels:
            raise InputError("image", raw.mode, f"has another mode than the {_MODES[self.channels]} that was expected")
        if raw.size != (self.width, self.height):
            if not self.resize:
                raise InputError(
                    "image", f"{raw.width}x{raw.height}", f"expected {self.width}x{self.height}; or set resize: true"
                )
            raw = _crop_to(raw, self.width, self.height)
        if raw.mode == "I;16":  # PIL's own conversion cuts off instead of scaling
            pixels = np.asarray(raw, dtype=np.float32) / 257
        else:
            pixels = np.asarray(raw.convert(_MODES[self.channels]), dtype=np.float32)
        value = torch.from_numpy(pixels / 127.5 - 1.0)
        return value[None] if self.channels == 1 else value.permute(2, 0, 1).contiguous()

    def parse(self, text: str) -> PILImage.Image:
        try:
            with PILImage.open(text) as file:
                return file.copy()
        except OSError as error:
            raise InputError("image", text, f"cannot be read as an image: {error}") from None

    def postprocess(self, value: Tensor) -> list[PILImage.Image]:
        pixels = ((value.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
        arrays = pixels.permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
        return [PILImage.fromarray(array[..., 0] if self.channels == 1 else array) for array in arrays]

    @property
    def value_shape(self) -> tuple[int, ...]:
        return self.channels, self.height, self.width

    def placeholder(self) -> Tensor:
        return torch.zeros(self.value_shape)

    def encode(self, value: Tensor) -> Tensor:
        return value * self.scale

    def unencode(self, encoding: Tensor) -> Tensor:
        """The value whose encoding this is: for an anchor, z_0 -> x_0."""
        return encoding / self.scale

    def decode(self, features: Tensor, pooled: Tensor) -> Tensor:
        """(B, channels + 1, H, W): the mean, and log σ in the last channel, one number per image."""
        log_std = self.log_std(pooled).clamp(-5.0, 2.0)[:, :, None, None]  # (B, 1, 1, 1)
        mean = self.head(features)  # (B, channels, H, W)
        return torch.cat([mean, log_std.expand(-1, -1, self.height, self.width)], dim=1)

    def nll(self, params: Tensor, value: Tensor) -> Tensor:
        mean, log_std = params[:, :-1], params[:, -1:]
        nll = 0.5 * ((value - mean) / log_std.exp()) ** 2 + log_std + 0.5 * math.log(2 * math.pi)
        return nll.flatten(1).mean(dim=1)

    @property
    def dimensions(self) -> int:
        return math.prod(self.value_shape)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return self.value_shape

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        return params[:, :-1] + params[:, -1:].exp() * noise

    def mode(self, params: Tensor) -> Tensor:
        return params[:, :-1]

    def expected_encoding(self, params: Tensor) -> Tensor:
        return self.encode(params[:, :-1])


def _channels(mode: str) -> int:
    if mode not in _GREY + _COLOUR:
        raise InputError("image", mode, "is a mode whose values have no known range; convert it to L, I;16 or RGB")
    return 1 if mode in _GREY else 3


def _crop_to(image: PILImage.Image, width: int, height: int) -> PILImage.Image:
    """Largest centred crop of the wanted shape, then bicubic."""
    factor = min(image.width / width, image.height / height)
    crop_width, crop_height = factor * width, factor * height
    left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
    box = (left, top, left + crop_width, top + crop_height)
    return image.resize((width, height), PILImage.Resampling.BICUBIC, box=box)
