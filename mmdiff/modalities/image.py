"""Images: the usual anchor, in pixel space or in a frozen autoencoder's latent space; as an auxiliary, a Gaussian."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL
from PIL import Image as PILImage
from torch import Generator, Tensor

from mmdiff.augmentation import BICUBIC, Change, moved, recoloured
from mmdiff.errors import InputError
from mmdiff.modalities.anchor import Anchor
from mmdiff.modalities.base import Shape
from mmdiff.modalities.files import check_range, open_image
from mmdiff.modalities.grids import Size, cells, check_size, grown, height_width, to_space
from mmdiff.modalities.heads import GaussianHead, gaussian_nll, gaussian_sample
from mmdiff.modalities.pictures import MODES, flat, header, headers, loaded, one_size, pixels_of, resized

Background = int | tuple[int, int, int] | list[int]


class Image(Anchor):
    """An image; its value is (channels, height, width) float32 in [−1, 1].

    A raw value is whatever Pillow opens, of any mode: it is turned upright by its EXIF data and converted; 16 bits are
    scaled by their full range.

    Args:
        shape: the surroundings, see `Modality`.
        channels: 1 (grey) or 3 (RGB). Left out: 1 where all rows are grey, else 3.
        size: (height, width) in pixels, or one number for both. Left out: that of all rows, which must have one.
        resize: bring images of another size to `size` (centre crop to its shape, then bicubic) instead of refusing.
        scale: E(x) = scale · x; 1 for an anchor, 1/rms of the data for an aggregated image.
        background: RGB, or one number for a grey, 0 … 255, that shows through transparent pixels; default white.
        space: of an anchor: "pixel", or "latent", where E is the autoencoder's (frozen, never saved with the model).
        autoencoder: of a latent anchor: hub name or folder of a diffusers `AutoencoderKL`.
        latent_channels, latent_factor: of the autoencoder; read from it where the config leaves them out.
        head: whether a Gaussian head is built; the anchor needs none, the backbone's prediction is its own.
    """

    reads_images: ClassVar[bool] = True

    def __init__(
        self,
        shape: Shape,
        channels: int,
        size: Size,
        resize: bool = False,
        scale: float = 1.0,
        space: str = "pixel",
        autoencoder: str | None = None,
        latent_channels: int | None = None,
        latent_factor: int | None = None,
        head: bool = True,
        background: Background = 255,
    ) -> None:
        super().__init__(shape)
        if channels not in MODES:
            raise InputError("channels", channels, "an image has 1 (grey) or 3 (RGB) channels")
        if space == "latent" and head:
            raise InputError("space", space, "only the anchor is diffused in a latent space; leave it out here")
        for key, value in (("scale", scale), ("latent_channels", latent_channels), ("latent_factor", latent_factor)):
            if value is not None and not value > 0:
                raise InputError(key, value, "must be positive")
        self.background = _rgb(background)
        self.channels, (self.height, self.width) = channels, height_width(size)
        self.resize, self.scale, self.latent, self.autoencoder = resize, scale, space == "latent", autoencoder
        self.head = GaussianHead(shape, channels, (self.height, self.width)) if head else None
        self._frozen: list[AutoencoderKL] = []  # in a list: no submodule, so neither trained nor saved
        self._encoded: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def diffusion_space(
        channels: int,
        size: Size,
        space: str = "pixel",
        latent_channels: int | None = None,
        latent_factor: int | None = None,
        **_: Any,
    ) -> tuple[int, int, int]:
        height, width = height_width(size)
        if space == "pixel":
            return channels, height, width
        if space != "latent":
            raise InputError("space", space, "choose pixel or latent")
        if latent_channels is None or latent_factor is None:
            raise InputError("autoencoder", None, "a latent space needs one; name a hub repository or a folder")
        if height % latent_factor or width % latent_factor:
            raise InputError("size", (height, width), f"must be a multiple of the autoencoder's factor {latent_factor}")
        return latent_channels, height // latent_factor, width // latent_factor

    @staticmethod
    def bounded(space: str = "pixel", scale: float = 1.0, **_: Any) -> bool:
        return space == "pixel" and scale <= 1.0

    @property
    def frozen(self) -> AutoencoderKL | None:
        """The autoencoder of a latent anchor, loaded on first use."""
        if self.latent and not self._frozen:
            try:
                self.attach(AutoencoderKL.from_pretrained(self.autoencoder))
            except (OSError, ValueError, TypeError) as error:
                raise InputError("autoencoder", self.autoencoder, f"cannot be read: {error}") from None
        return self._frozen[0] if self._frozen else None

    def attach(self, autoencoder: AutoencoderKL) -> None:
        """Use this autoencoder instead of loading the one that was named."""
        self._frozen[:] = [autoencoder.requires_grad_(False).eval()]
        self._encoded = None

    @classmethod
    def settings_from_files(
        cls, space: str = "pixel", autoencoder: str | None = None, **settings: Any
    ) -> dict[str, Any]:
        if space != "latent" or autoencoder is None or {"latent_channels", "latent_factor"} <= set(settings):
            return {}
        try:
            config = AutoencoderKL.load_config(autoencoder)
        except (OSError, ValueError) as error:
            raise InputError("autoencoder", autoencoder, f"cannot be read: {error}") from None
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        return {"latent_channels": config["latent_channels"], "latent_factor": factor}

    @classmethod
    def settings_from_data(
        cls, feature: Any, values: Iterable[Any], channels: int | None = None, size: Any = None, **_: Any
    ) -> dict[str, Any]:
        if channels is not None and size is not None:
            return {}
        channel_counts, sizes = headers("image", values)
        if not channel_counts:
            raise InputError("image", None, "the column holds no image; check data.columns")
        return {"channels": channel_counts[0], **({} if size is not None else {"size": one_size("image", sizes)})}

    @classmethod
    def check_readable(cls, raw: Any) -> None:
        header("image", raw)

    def preprocess(self, raw: Any) -> Tensor:
        picture = self._picture(raw)
        if not self.resize:
            check_size("image", (picture.height, picture.width), (self.height, self.width))
        return self.value(picture)

    def check_observed(self, value: Tensor) -> None:
        check_range("image", value)

    def parse(self, text: str) -> PILImage.Image:
        return self.fitted(open_image("image", text))

    def fitted(self, raw: Any) -> PILImage.Image:
        """A raw value brought to the size, whatever `resize` says."""
        return resized(self._picture(raw), self.width, self.height)

    def value(self, picture: PILImage.Image) -> Tensor:
        """An image from `flat`, of any size, as a value."""
        fitted = resized(picture, self.width, self.height)
        return torch.from_numpy(pixels_of(fitted, self.channels) / 127.5 - 1.0)

    def _picture(self, raw: Any) -> PILImage.Image:
        return flat(loaded("image", raw), self.channels, self.background)

    def postprocess(self, value: Tensor) -> list[PILImage.Image]:
        pixels = ((value.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
        arrays = pixels.permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
        return [PILImage.fromarray(array[..., 0] if self.channels == 1 else array) for array in arrays]

    @property
    def value_shape(self) -> tuple[int, ...]:
        return self.channels, self.height, self.width

    def follow(self, value: Tensor, change: Change) -> Tensor:
        return recoloured(moved(value, change, BICUBIC).clamp(-1, 1), change)

    def examples(self, count: int, generator: Generator) -> Tensor:
        rows, columns, factor = cells((self.height, self.width), self.shape.space)
        signs = torch.randint(2, (count, 1, rows, columns), generator=generator) * 2.0 - 1.0
        return grown(signs.expand(-1, self.channels, -1, -1), factor) / max(self.scale, 1.0)

    def encode(self, value: Tensor) -> Tensor:
        if self.latent:
            return self._latents(value) * self.scale
        return to_space(value * self.scale, self.shape.space)

    def unencode(self, encoding: Tensor) -> Tensor:
        """The value whose encoding this is: for an anchor, z_0 -> x_0."""
        if not self.latent:
            return encoding / self.scale
        config = self.frozen.config
        latents = encoding / (self.scale * config.scaling_factor) + (config.shift_factor or 0.0)
        return self.frozen.to(encoding.device).decode(latents.to(self.frozen.dtype)).sample.to(encoding.dtype)

    @torch.no_grad()
    def _latents(self, value: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, C, H, W): the mode of the autoencoder's posterior, brought to unit scale.

        One batch is remembered: a training step asks for it as z_0 and as an observation.
        """
        if self._encoded is None or self._encoded[0] is not value:
            config = self.frozen.config
            posterior = self.frozen.to(value.device).encode(value.to(self.frozen.dtype)).latent_dist
            latents = (posterior.mode() - (config.shift_factor or 0.0)) * config.scaling_factor
            self._encoded = value, latents.to(value.dtype)
        return self._encoded[1]

    def decode(self, features: Tensor, pooled: Tensor) -> Tensor:
        """(B, channels + 1, height, width): the mean, and log σ in the last channel, one number per image."""
        return self.head(features, pooled)

    def nll(self, params: Tensor, value: Tensor) -> Tensor:
        return gaussian_nll(params, value).flatten(1).mean(dim=1)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        return gaussian_sample(params, noise)

    def mode(self, params: Tensor) -> Tensor:
        return params[:, :-1]


def _rgb(background: Background) -> tuple[int, int, int]:
    colour = tuple(background) if isinstance(background, list | tuple) else (background,) * 3
    if len(colour) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in colour):
        raise InputError("background", background, "needs one grey or three RGB numbers, 0 … 255")
    return colour
