"""Segmentation masks: E is a palette of class vectors in diffusion space, the head a categorical per pixel."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Generator, Tensor, nn

from mmdiff.errors import InputError
from mmdiff.likelihoods import categorical_log_prob, categorical_sample, mean_logits
from mmdiff.modalities.base import Modality, Shape
from mmdiff.modalities.heads import (
    Size,
    SpatialHead,
    as_array,
    cells,
    grid_channels,
    grown,
    height_width,
    open_image,
    save_image,
    to_grid,
    to_space,
    widened,
)
from mmdiff.modalities.pictures import loaded, resized


class Mask(Modality):
    """A map of class ids; its value is (height, width) int64, 0 … K − 1 or `ignore`.

    Ignored pixels are zero in the encoding, count nothing in the likelihood and are never predicted.

    Args:
        shape: the surroundings, see `Modality`.
        num_classes: K. Taken from the data where the config leaves it out.
        size: (height, width) in pixels, or one number for both. Taken from the data where the config leaves it out.
        ignore: the id of pixels without a class.
        resize: bring masks of another size to `size` (centre crop to its shape, then nearest) instead of refusing.
        palette: "learned", or "fixed" at its random start.
        palette_size: side of each class's own pattern, repeated over the diffusion space. 1 (one vector per class)
            needs a diffusion space of two channels or more.
    """

    reads_images: ClassVar[bool] = True

    def __init__(
        self,
        shape: Shape,
        num_classes: int,
        size: Size,
        ignore: int = 255,
        resize: bool = False,
        palette: str = "learned",
        palette_size: int = 1,
    ) -> None:
        super().__init__(shape)
        channels, rows, columns = shape.space
        if num_classes < 2:
            raise InputError("num_classes", num_classes, "a mask needs at least two classes")
        if not 0 <= ignore <= 255 or ignore < num_classes:
            raise InputError("ignore", ignore, f"must be an id from {num_classes} to 255, no class's own")
        if palette not in ("learned", "fixed"):
            raise InputError("palette", palette, "choose learned or fixed")
        self.num_classes, self.ignore, self.resize = num_classes, ignore, resize
        self.height, self.width = height_width(size)
        if palette_size < 1 or rows % palette_size or columns % palette_size:
            raise InputError("palette_size", palette_size, f"must divide the diffusion space's {rows}x{columns}")
        if channels * palette_size**2 == 1:
            raise InputError("palette_size", palette_size, "one channel holds only ±1; take 2 or more")
        self.palette = nn.Parameter(
            _spread(num_classes, channels * palette_size**2).reshape(num_classes, channels, palette_size, palette_size),
            requires_grad=palette == "learned",
        )
        self.head = SpatialHead(shape, num_classes, (self.height, self.width))

    @classmethod
    def settings_from_data(
        cls, feature: Any, values: Iterable[Any], num_classes: int | None = None, ignore: int = 255, **_: Any
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        largest = -1
        for value in values:
            if value is None:
                continue
            ids = _ids(value)
            found.setdefault("size", list(ids.shape))
            if num_classes is not None:
                return found
            largest = max(largest, int(ids[ids != ignore].max(initial=-1)))
        if largest < 0:
            raise InputError("mask", None, "the column holds no class ids; check data.columns")
        return {**found, "num_classes": largest + 1}

    @classmethod
    def check_readable(cls, raw: Any) -> None:
        _ids(raw)

    def preprocess(self, raw: Any) -> Tensor:
        ids = _ids(raw)
        if ids.shape != (self.height, self.width):
            if not self.resize:
                shown = f"{ids.shape[1]}x{ids.shape[0]}"
                raise InputError("mask", shown, f"expected {self.width}x{self.height}; or set resize: true")
            picture = PILImage.fromarray(ids.astype(np.int32))
            ids = np.asarray(resized(picture, self.width, self.height, PILImage.Resampling.NEAREST))
        value = torch.from_numpy(ids.astype(np.int64))
        self._check_ids(value)
        return value

    def parse(self, text: str) -> PILImage.Image:
        raw = open_image("mask", text)
        if raw.size == (self.width, self.height):
            return raw
        return resized(raw, self.width, self.height, PILImage.Resampling.NEAREST)

    def save(self, shown: PILImage.Image, stem: Path) -> Path:
        return save_image(shown, stem)

    def check(self, value: Tensor) -> None:
        super().check(value)
        self._check_ids(value)

    def _check_ids(self, value: Tensor) -> None:
        outside = value[((value < 0) | (value >= self.num_classes)) & (value != self.ignore)]
        if len(outside):
            raise InputError(
                "mask",
                int(outside[0]),
                f"is no class 0 … {self.num_classes - 1} and not ignore = {self.ignore}; check num_classes and ignore",
            )

    def postprocess(self, value: Tensor) -> list[PILImage.Image]:
        """Coloured images of mode P, whose pixels are the ids."""
        pictures = [PILImage.fromarray(ids) for ids in value.detach().to(torch.uint8).cpu().numpy()]
        for picture in pictures:
            picture.putpalette(colours(self.num_classes, self.ignore))  # turns mode L into P
        return pictures

    @property
    def value_shape(self) -> tuple[int, ...]:
        return self.height, self.width

    def placeholder(self) -> Tensor:
        return torch.full(self.value_shape, self.ignore)

    def examples(self, count: int, generator: Generator) -> Tensor:
        rows, columns, factor = cells((self.height, self.width), self.shape.space)
        return grown(torch.randint(self.num_classes, (count, rows, columns), generator=generator), factor)

    def _patterns(self) -> Tensor:
        """(K, C, p, p) with mean square 1 per class."""
        palette = widened(self.palette)
        return palette / palette.square().mean(dim=(1, 2, 3), keepdim=True).add(1e-12).sqrt()

    def _shares(self, value: Tensor) -> Tensor:
        """(B, K, h, w) one-hot; all zero where ignored."""
        classes = torch.arange(self.num_classes, device=value.device)[:, None, None]
        return widened((value[:, None] == classes).to(self.palette.dtype))

    def _encode_shares(self, shares: Tensor) -> Tensor:
        """Σ_k shares_k · pattern_k, (B, K, h, w) -> (B, C, H, W)."""
        _, height, width = self.shape.space
        patterns, side = self._patterns(), self.palette.shape[-1]
        shares = to_space(shares, (self.num_classes, height, width))
        if side == 1:
            return torch.einsum("bkhw,kc->bchw", shares, patterns[..., 0, 0])
        tiled = patterns.repeat(1, 1, height // side, width // side)  # (K, C, H, W)
        return torch.einsum("bkhw,kchw->bchw", shares, tiled)

    def encode(self, value: Tensor) -> Tensor:
        """Mean square 1 over labelled pixels; less where a pixel of the diffusion space covers several classes."""
        return self._encode_shares(self._shares(value))

    @property
    def observation_channels(self) -> int:
        return grid_channels(self.num_classes, (self.height, self.width), self.shape.space)

    def observe(self, value: Tensor) -> Tensor:
        """One channel per class (and per pixel of a patch, where the mask is finer than the diffusion space)."""
        return to_grid(self._shares(value), self.shape.space)

    def decode(self, features: Tensor, pooled: Tensor) -> Tensor:
        return self.head(features)  # (B, K, h, w)

    def nll(self, params: Tensor, value: Tensor) -> Tensor:
        """Per pixel of the map: ignored pixels count 0 and are not left out of the mean."""
        labelled = value != self.ignore
        log_prob = categorical_log_prob(params, torch.where(labelled, value, 0))  # (B, h, w)
        return -(log_prob * labelled).flatten(1).mean(dim=1)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        return categorical_sample(params, noise)

    def mode(self, params: Tensor) -> Tensor:
        return params.argmax(dim=1)

    def average(self, params: list[Tensor]) -> Tensor:
        """Of the probabilities, pixel by pixel."""
        return mean_logits(params)

    def expected_encoding(self, params: Tensor) -> Tensor:
        return self._encode_shares(params.softmax(dim=1))


def colours(num_classes: int, ignore: int = 255) -> list[int]:
    """A palette of 256 RGB colours for PIL: well separated hues for classes, black for `ignore`."""
    table = [0] * 768
    for k in range(num_classes):
        hue, lightness = k * 0.61803399 % 1.0, (0.5, 0.7, 0.35)[k % 3]  # the golden ratio spreads any number of hues
        table[3 * k : 3 * k + 3] = [round(255 * c) for c in colorsys.hls_to_rgb(hue, lightness, 0.75)]
    table[3 * ignore : 3 * ignore + 3] = [0, 0, 0]
    return table


def _ids(raw: Any) -> np.ndarray:
    """A PIL image of ids, or a nested list -> (height, width)."""
    if isinstance(raw, PILImage.Image | Mapping):
        raw = loaded("mask", raw)
        if raw.mode not in ("1", "L", "P", "I", "I;16"):
            raise InputError("mask", raw.mode, "is no image of class ids; store ids as a PNG of mode L or P")
        return np.asarray(raw).astype(np.int64)
    ids = as_array(raw)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError("mask", type(raw).__name__, "is no map of class ids; check data.columns")
    return ids.astype(np.int64)


def _spread(count: int, dimension: int, tries: int = 512) -> Tensor:
    """Vectors on the sphere that keep apart: each is the random candidate farthest from those before it."""
    candidates = nn.functional.normalize(torch.randn(tries + count, dimension), dim=1)
    chosen = [0]
    distance = (candidates - candidates[0]).norm(dim=1)
    for _ in range(count - 1):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (candidates - candidates[chosen[-1]]).norm(dim=1))
    return candidates[chosen]
