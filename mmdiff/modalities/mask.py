"""Segmentation masks: E is a palette of class vectors in diffusion space, the head a categorical per pixel."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Generator, Tensor, nn

from mmdiff.augmentation import NEAREST, Change, moved
from mmdiff.errors import InputError
from mmdiff.likelihoods import categorical_log_prob, categorical_sample, mean_logits
from mmdiff.modalities.base import ONLY_ALL_ROWS, Shape
from mmdiff.modalities.diffusible import Diffusible
from mmdiff.modalities.files import open_image
from mmdiff.modalities.grids import Size, cells, check_size, grid_channels, grown, height_width, to_grid, to_space
from mmdiff.modalities.heads import SpatialHead, widened
from mmdiff.modalities.pictures import one_size, resized
from mmdiff.modalities.raw_masks import (
    check_known,
    check_lists,
    classes,
    counted,
    free_id,
    number_of_classes,
    own_palette,
    packed,
    raw_ids,
    raw_ignore_of,
    readable,
    remedy_of,
    shares,
    tally,
    unpacked,
)
from mmdiff.slots import Axis, ModalitySlots, parts, slots


class Mask(Diffusible):
    """A map of classes; its value is (height, width) int64, 0 … K − 1 or the attribute `ignore`.

    Ignored pixels are zero in the encoding, count nothing in the likelihood and are never predicted. A raw value is an
    image of ids (any integer mode, also grey stored in colour), an image of colours, an array or a nested list.

    Args:
        shape: the surroundings, see `Modality`.
        num_classes: K. Taken from `values`, `colors` or the data where the config leaves it out.
        size: (height, width) in pixels, or one number for both. Taken from the data where the config leaves it out.
        ignore: the raw id (of coloured masks the RGB colour) of pixels without a class; null: every pixel has one.
        resize: bring masks of another size to `size` (centre crop to its shape, then nearest) instead of refusing.
        patterns: of the encoding: "learned", or "fixed" at its random start.
        pattern_size: side of each class's own pattern, repeated over the diffusion space; 1 is one vector per class.
            Default: 1, or 2 where the space has one channel, which holds only ±1.
        values: raw ids in the order of the classes, such as [0, 255]; default 0 … K − 1.
        colors: RGB colours in the order of the classes, for masks that are stored in colour.
        names: of the classes, for reports.
        palette: RGB colours of the classes in pictures; default `colors`, an indexed image's own, or separate hues.
    """

    reads_images: ClassVar[bool] = True
    pixelwise: ClassVar[bool] = True

    def __init__(
        self,
        shape: Shape,
        num_classes: int,
        size: Size,
        ignore: int | list[int] | None = 255,
        resize: bool = False,
        patterns: str = "learned",
        pattern_size: int | None = None,
        values: list[int] | None = None,
        colors: list[list[int]] | None = None,
        names: list[str] | None = None,
        palette: list[list[int]] | None = None,
    ) -> None:
        super().__init__(shape)
        channels, rows, columns = shape.space
        if not 2 <= num_classes <= 255:
            raise InputError("num_classes", num_classes, "a mask needs two classes at least, 255 at most")
        if patterns not in ("learned", "fixed"):
            raise InputError("patterns", patterns, "choose learned or fixed")
        check_lists(num_classes, values=values, colors=colors, names=names, palette=palette)
        self.num_classes, self.resize, self.names, self.coloured = num_classes, resize, names, colors is not None
        raws = list(map(packed, colors)) if colors else list(values or range(num_classes))
        self.raw_ignore = raw_ignore_of(ignore, raws, self.coloured)
        plain = not (values or colors) and ignore is not None and ignore <= 255
        self.ignore = self.raw_ignore if plain else 255  # in values, whatever stands in the files
        self.raws, self.known = raws, {raw: index for index, raw in enumerate(raws)}
        if self.raw_ignore is not None:
            self.known[self.raw_ignore] = self.ignore
        self.shown_ids = list(range(num_classes)) if self.coloured else raws
        self.shown_ignore = free_id(self.shown_ids, self.raw_ignore)
        self.colours = palette or colors or _hues(num_classes)
        self.height, self.width = height_width(size)
        pattern_size = (2 if channels == 1 else 1) if pattern_size is None else pattern_size
        if pattern_size < 1 or rows % pattern_size or columns % pattern_size:
            raise InputError("pattern_size", pattern_size, f"must divide the diffusion space's {rows}x{columns}")
        if channels * pattern_size**2 == 1:
            raise InputError("pattern_size", pattern_size, "one channel holds only ±1; take 2 or more")
        self.palette = nn.Parameter(
            _spread(num_classes, channels * pattern_size**2).reshape(num_classes, channels, pattern_size, pattern_size),
            requires_grad=patterns == "learned",
        )
        self.head = SpatialHead(shape, num_classes, (self.height, self.width))

    def slots(self, by_name: bool) -> ModalitySlots:
        classes = slots(self.names if by_name else [("colour" if self.coloured else "id", raw) for raw in self.raws])
        channels = parts(classes, self.observation_channels // self.num_classes)
        rows = {0: Axis(parts(classes, self.head.up**2))}
        state = {"palette": {0: Axis(classes)}, "head.conv.weight": rows, "head.conv.bias": rows}
        return ModalitySlots(state, channels, [])

    @classmethod
    def settings_from_data(
        cls,
        feature: Any,
        raws: Iterable[Any],
        /,
        num_classes: int | None = None,
        size: Any = None,
        values: list[int] | None = None,
        colors: list[list[int]] | None = None,
        palette: Any = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """The whole column is read: a raw value that stands for no class is refused with the values found."""
        pixels, sizes, first = counted(raws, colors is not None)
        ignore = raw_ignore_of(settings.get("ignore", 255), values or [], colors is not None)
        count = len(values or colors or []) or num_classes or number_of_classes(pixels, ignore, "ignore" in settings)
        known = list(map(packed, colors)) if colors else list(values or range(count))
        allowed = [*known, *([] if ignore is None else [ignore])]
        check_known(pixels, allowed, colors is not None, remedy_of(pixels, count, colors is not None))
        if "ignore" not in settings and ignore in pixels and sum(raw in pixels for raw in known) < 2 and not colors:
            raise InputError(
                "mask", ignore, f"would be ignored; found {shares(pixels, False)}; {remedy_of(pixels, count)}"
            )
        result: dict[str, Any] = {} if size is not None else {"size": one_size("mask", sizes)}
        own = None if palette or colors else own_palette(first, known)
        return {**result, "num_classes": count, **({"palette": own} if own else {})}

    @classmethod
    def settings_from_stream(cls, feature: Any, num_classes: int | None = None, **settings: Any) -> dict[str, Any]:
        if num_classes is None and not settings.get("values") and not settings.get("colors"):
            raise InputError("num_classes", None, ONLY_ALL_ROWS)
        return {}

    @classmethod
    def check_readable(cls, raw: Any) -> None:
        readable(raw)

    def preprocess(self, raw: Any) -> Tensor:
        ids = raw_ids(raw, self.coloured)
        if ids.shape != (self.height, self.width):
            if not self.resize:
                check_size("mask", ids.shape, (self.height, self.width))
            picture = PILImage.fromarray(ids.astype(np.int32))
            ids = np.asarray(resized(picture, self.width, self.height, PILImage.Resampling.NEAREST))
        known = self.known if self.coloured else {self.shown_ignore: self.ignore, **self.known}
        check_known(tally(ids), list(known), self.coloured, "check num_classes, values and ignore")
        return torch.from_numpy(classes(ids, known))

    def parse(self, text: str) -> PILImage.Image:
        raw = open_image("mask", text)
        if raw.size == (self.width, self.height):
            return raw
        return resized(raw, self.width, self.height, PILImage.Resampling.NEAREST)

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
        """Images whose pixels are the raw ids (of coloured masks the classes): of mode P in the classes' colours, of
        mode I;16 where ids are above 255."""
        table = np.zeros(256, dtype=np.int32)
        table[: self.num_classes], table[self.ignore] = self.shown_ids, self.shown_ignore
        ids = [table[one] for one in value.detach().cpu().numpy()]
        if max(self.shown_ids) > 255:
            return [PILImage.fromarray(one.astype(np.uint16)) for one in ids]
        pictures = [PILImage.fromarray(one.astype(np.uint8)) for one in ids]
        for picture in pictures:
            picture.putpalette(self._colour_table())  # turns mode L into P
        return pictures

    def _colour_table(self) -> list[int]:
        """256 RGB colours; black where no class is."""
        colours = np.zeros((256, 3), dtype=int)
        colours[self.shown_ids] = self.colours
        if self.coloured and self.raw_ignore is not None:
            colours[self.shown_ignore] = unpacked(self.raw_ignore)
        return colours.flatten().tolist()

    @property
    def value_shape(self) -> tuple[int, ...]:
        return self.height, self.width

    def placeholder(self) -> Tensor:
        return torch.full(self.value_shape, self.ignore)

    def follow(self, value: Tensor, change: Change) -> Tensor:
        return moved(value, change, NEAREST)

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
        tiled = patterns.repeat(1, 1, -(-height // side), -(-width // side))[..., :height, :width]  # (K, C, H, W)
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

    def expected_signal(self, params: Tensor) -> Tensor:
        return to_grid(params.softmax(dim=1), self.shape.space)


def _hues(num_classes: int) -> list[list[int]]:
    """RGB colours of well separated hues; the golden ratio spreads any number of them."""
    hls = ((k * 0.61803399 % 1.0, (0.5, 0.7, 0.35)[k % 3], 0.75) for k in range(num_classes))
    return [[round(255 * c) for c in colorsys.hls_to_rgb(*colour)] for colour in hls]


def _spread(count: int, dimension: int, tries: int = 512) -> Tensor:
    """Vectors on the sphere that keep apart: each is the random candidate farthest from those before it."""
    candidates = nn.functional.normalize(torch.randn(tries + count, dimension), dim=1)
    chosen = [0]
    distance = (candidates - candidates[0]).norm(dim=1)
    for _ in range(count - 1):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (candidates - candidates[chosen[-1]]).norm(dim=1))
    return candidates[chosen]
