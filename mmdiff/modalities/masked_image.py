"""The anchor with holes: E is the identity on known pixels, the head predicts the whole image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageChops
from torch import Generator, Tensor
from torch.nn.functional import adaptive_max_pool2d

from mmdiff.augmentation import BICUBIC, Change, moved, recoloured
from mmdiff.errors import InputError
from mmdiff.modalities.anchor import Anchor, FillsAnchor, KnownPart
from mmdiff.modalities.base import Shape
from mmdiff.modalities.files import check_range, open_image
from mmdiff.modalities.grids import Size, check_size, grid_channels, height_width, to_grid, to_space
from mmdiff.modalities.heads import GaussianHead, gaussian_nll, gaussian_sample
from mmdiff.modalities.pictures import flat, pixels_of, resized, with_alpha

_MODES = {1: "LA", 3: "RGBA"}


class MaskedImage(FillsAnchor):
    """An image with a hole; its value is (channels + 1, height, width) float32.

    The last channel is 1 where a pixel is known and 0 in the hole. The others are in [−1, 1], and 0 in the hole. As a
    raw value it is an image with an alpha channel, opaque where it is known. It is observed or absent, never
    aggregated.

    Args:
        shape: the surroundings, see `Modality`.
        channels: the anchor's.
        size: the anchor's.
        resize: see `Image`.
        fill: what the backbone sees in the hole, beside the hole channel: "zero", or "smooth", a fill from the pixels
            around it (see `smooth_fill`), which helps short trainings.
    """

    reads_images: ClassVar[bool] = True
    free_settings: ClassVar[frozenset[str]] = frozenset({"fill"})

    def __init__(self, shape: Shape, channels: int, size: Size, resize: bool = False, fill: str = "zero") -> None:
        super().__init__(shape)
        if channels not in _MODES:
            raise InputError("channels", channels, "an image has 1 (grey) or 3 (RGB) channels")
        if fill not in FILLS:
            raise InputError("fill", fill, f"choose {' or '.join(FILLS)}")
        self.channels, self.resize, self.fill = channels, resize, FILLS[fill]
        self.height, self.width = height_width(size)
        self.head = GaussianHead(shape, channels, (self.height, self.width))

    @classmethod
    def settings_from_anchor(cls, channels: int | None = None, size: Any = None, **_: Any) -> dict[str, Any]:
        settings = {"channels": channels, "size": size}
        return {name: value for name, value in settings.items() if value is not None}

    def check_anchor(self, anchor: Anchor) -> None:
        own = (self.channels, self.height, self.width)
        if anchor.value_shape != own:
            raise InputError("size", own, f"must be the anchor's (channels, height, width) = {anchor.value_shape}")

    def preprocess(self, raw: Any) -> Tensor:
        raw = with_alpha("masked_image", raw, _MODES[self.channels])
        if not self.resize:
            check_size("masked_image", (raw.height, raw.width), (self.height, self.width))
        raw = self._fitted(raw)
        pixels = torch.from_numpy(np.asarray(raw, dtype=np.float32)).permute(2, 0, 1)  # (channels + 1, h, w)
        known = (pixels[-1:] >= 128).float()
        return torch.cat([(pixels[:-1] / 127.5 - 1.0) * known, known])

    def parse(self, text: str) -> PILImage.Image:
        """`photo.png`, transparent in the hole, or `photo.png@mask.png`: white is known, black is the hole."""
        path, _, mask = text.rpartition("@") if "@" in text and not Path(text).is_file() else (text, "", None)
        if mask == "":
            raise InputError("masked_image", text, "names no file after the @; write photo.png@mask.png")
        photo = open_image("masked_image", path)
        if mask is None and not photo.has_transparency_data:
            remedy = "has no alpha channel that says where it is known; write photo.png@mask.png, black in the hole"
            raise InputError("masked_image", text, remedy)
        photo = self._known_where_opaque(photo)
        if mask is not None:
            known = _known(text, open_image("masked_image", mask), photo.size)
            photo.putalpha(ImageChops.darker(photo.getchannel("A"), known))
        return self._fitted(photo)

    def _known_where_opaque(self, photo: PILImage.Image) -> PILImage.Image:
        if photo.has_transparency_data:
            return with_alpha("masked_image", photo, _MODES[self.channels])
        pixels = pixels_of(flat(photo, self.channels, (255, 255, 255)), self.channels).round().astype(np.uint8)
        whole = PILImage.fromarray(pixels[0] if self.channels == 1 else pixels.transpose(1, 2, 0))
        whole.putalpha(255)
        return whole

    def _fitted(self, raw: PILImage.Image) -> PILImage.Image:
        """Centre crop to the shape, then resampled over what is known; holes keep their edges (nearest).

        Hamming's filter is as sharp as bicubic and has no negative lobes, which overshoot where known pixels end.
        """
        if raw.size == (self.width, self.height):
            return raw
        alpha = raw.getchannel("A").point([0] * 128 + [255] * 128)
        raw = raw.copy()
        raw.putalpha(alpha)
        fitted = resized(
            raw, self.width, self.height, PILImage.Resampling.HAMMING
        )  # PIL weighs colours by alpha: nothing leaks out of the hole
        fitted.putalpha(resized(alpha, self.width, self.height, PILImage.Resampling.NEAREST))
        return fitted

    def check(self, value: Tensor) -> None:
        super().check(value)
        known = value[:, -1]
        if not ((known == 0) | (known == 1)).all():
            raise InputError("masked_image", "its last channel", "must be 1 where a pixel is known and 0 in the hole")

    def check_observed(self, value: Tensor) -> None:
        check_range("masked_image", value[:, :-1])

    def postprocess(self, value: Tensor) -> list[PILImage.Image]:
        """Images with an alpha channel, transparent in the hole."""
        pixels = ((value[:, :-1].detach().float().clamp(-1, 1) + 1) * 127.5).round()
        alpha = value[:, -1:].detach().float() * 255
        arrays = torch.cat([pixels, alpha], dim=1).byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, h, w, channels + 1)
        return [PILImage.fromarray(array, _MODES[self.channels]) for array in arrays]

    @property
    def value_shape(self) -> tuple[int, ...]:
        return self.channels + 1, self.height, self.width

    def follow(self, value: Tensor, change: Change) -> Tensor:
        """As the image does; known is what no hidden pixel takes part in, so that nothing leaks out of the hole."""
        if change.contrast != 1:
            remedy = "needs the mean of the whole image; leave it out, or make the holes by data.masking"
            raise InputError("contrast", change.contrast, remedy)
        hidden = moved(1 - value[-1:], change, BICUBIC).abs() > 1e-6
        pixels = recoloured(moved(value[:-1], change, BICUBIC).clamp(-1, 1), change)
        return torch.cat([pixels * ~hidden, (~hidden).to(pixels)])

    def examples(self, count: int, generator: Generator) -> Tensor:
        pixels = torch.randint(2, (count, self.channels, self.height, self.width), generator=generator) * 2.0 - 1.0
        known = (torch.rand(count, 1, self.height, self.width, generator=generator) < 0.5).float()
        return torch.cat([pixels * known, known], dim=1)

    def encode(self, value: Tensor) -> Tensor:
        """The known pixels, 0 in the hole."""
        return to_space(value[:, :-1] * value[:, -1:], self.shape.space)

    @property
    def observation_channels(self) -> int:
        return grid_channels(self.channels + 1, (self.height, self.width), self.shape.space)

    def observe(self, value: Tensor) -> Tensor:
        """Known pixels, the fill, and the hole channel (patches as channels, where the diffusion space is coarser)."""
        pixels, known = value[:, :-1], value[:, -1:]
        return to_grid(torch.cat([self.fill(pixels * known, known), known], dim=1), self.shape.space)

    def decode(self, features: Tensor, pooled: Tensor) -> Tensor:
        """(B, channels + 1, height, width): the mean of the whole image, and log σ in the last channel."""
        return self.head(features, pooled)

    def target(self, value: Tensor, anchor: Tensor) -> Tensor:
        """The whole image beside the hole channel."""
        return torch.cat([anchor, value[:, -1:]], dim=1)

    def nll(self, params: Tensor, value: Tensor) -> Tensor:
        """Gaussian on the hole, averaged over all pixels: known ones count 0 and are not left out of the mean."""
        hole = 1.0 - value[:, -1:]  # (B, 1, h, w)
        return (gaussian_nll(params, value[:, :-1]) * hole).flatten(1).mean(dim=1)

    @property
    def dimensions(self) -> int:
        return self.channels * self.height * self.width

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return self.channels, self.height, self.width

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        return _whole(gaussian_sample(params, noise))

    def mode(self, params: Tensor) -> Tensor:
        return _whole(params[:, :-1])

    def anchor_mode(self, params: Tensor) -> Tensor:
        return params[:, :-1]

    def known_part(self, value: Tensor, anchor: Anchor) -> KnownPart:
        """Known pixels; in a latent space the cells all of whose pixels are known."""
        pixels, known = value[:, :-1], value[:, -1:]
        # an autoencoder looks beyond a cell: there the hole is as bright as what is known
        encoding = anchor.encode(torch.where(known > 0, pixels, mean_fill(pixels, known)))  # (B, C, H, W)
        return KnownPart(encoding, adaptive_max_pool2d(1 - known, encoding.shape[2:]) == 0)

    def paste(self, anchor: Tensor, value: Tensor) -> Tensor:
        return torch.where(value[:, -1:] > 0, value[:, :-1].to(anchor.dtype), anchor)


def mean_fill(pixels: Tensor, known: Tensor) -> Tensor:
    """The mean of what is known, per image and channel.

    Args:
        pixels: (n, C, H, W).
        known: (n, 1, H, W), 0 in the hole.
    """
    mean = (pixels * known).sum(dim=(2, 3), keepdim=True) / known.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    return mean.expand_as(pixels)


def smooth_fill(pixels: Tensor, known: Tensor, width: float = 1 / 32) -> Tensor:
    """Means of known pixels, weighted by a Gaussian of the distance, (B, C, H, W); known pixels are blurred, too.

    Args:
        pixels: (B, C, H, W), 0 in the hole.
        known: (B, 1, H, W), 1 = known.
        width: σ as a part of the shorter side.
    """
    sides = pixels.shape[2:]
    rows, columns = (_gaussian(side, width * min(sides)).to(pixels.device) for side in sides)
    weight = rows @ known.double() @ columns  # (B, 1, H, W)
    filled = rows @ (pixels * known).double() @ columns / weight.clamp(min=torch.finfo(torch.float64).tiny)
    return filled.to(pixels.dtype)


def _gaussian(side: int, sigma: float) -> Tensor:
    """(side, side) float64, with tails: what is far counts where nothing is near."""
    places = torch.arange(side, dtype=torch.float64)
    return torch.exp(-0.5 * ((places[:, None] - places) / sigma).square().clamp(max=600))


def _known_only(pixels: Tensor, known: Tensor) -> Tensor:
    return pixels


def _smooth(pixels: Tensor, known: Tensor) -> Tensor:
    return torch.where(known > 0, pixels, smooth_fill(pixels, known))


FILLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zero": _known_only,
    "smooth": _smooth,
}


def _known(text: str, mask: PILImage.Image, size: tuple[int, int]) -> PILImage.Image:
    """A mask file as an alpha channel."""
    if mask.size != size:
        sizes = f"{size[0]}x{size[1]} and {mask.width}x{mask.height}"
        raise InputError("masked_image", text, f"the photo and its mask need one size, they have {sizes}")
    known = PILImage.fromarray(pixels_of(flat(mask, 1, (0, 0, 0)), 1)[0].round().astype(np.uint8))
    if known.getextrema()[1] < 128:
        raise InputError(
            "masked_image", text, "the mask hides every pixel: white (255) is known, black (0) is the hole"
        )
    return known


def _whole(image: Tensor) -> Tensor:
    """An image without a hole as a value."""
    return torch.cat([image, torch.ones_like(image[:, :1])], dim=1)
