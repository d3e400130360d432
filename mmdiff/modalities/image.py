"""Images: the usual anchor, in pixel space or in a frozen autoencoder's latent space; as an auxiliary, a Gaussian."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
from diffusers import ModelMixin
from PIL import Image as PILImage
from torch import Generator, Tensor

from mmdiff.augmentation import BICUBIC, Change, moved, recoloured
from mmdiff.errors import InputError
from mmdiff.modalities import autoencoder as latents
from mmdiff.modalities.anchor import Anchor
from mmdiff.modalities.base import Shape
from mmdiff.modalities.diffusible import Diffusible
from mmdiff.modalities.files import check_range, open_image
from mmdiff.modalities.grids import Size, cells, check_size, grown, height_width, to_space
from mmdiff.modalities.heads import GaussianHead, gaussian_nll, gaussian_sample
from mmdiff.modalities.latent_scale import Scale, given_scale, measure, scale_of_config
from mmdiff.modalities.pictures import MODES, flat, header, headers, loaded, one_size, pixels_of, resized

LATENT = ("latent_channels", "latent_factor", "latent_scale", "latents_mean", "latents_std", "latent_draw")
Background = int | tuple[int, int, int] | list[int]


class Image(Anchor, Diffusible):
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
        autoencoder: of a latent anchor: hub name or folder of an autoencoder of diffusers, of any class in
            `mmdiff.modalities.autoencoder.FAMILIES`.
        latent_channels, latent_factor: of the autoencoder; read from it where the config leaves them out.
        latent_scale: what brings latents to unit scale: "config" (the autoencoder's) or "measured" (mean and standard
            deviation of each channel over training images); by default its config's where that says something.
        latents_mean, latents_std: what was measured, a number per latent channel.
        latent_draw: in training take a fresh draw of the autoencoder's posterior at every visit, not its mode.
        head: whether a Gaussian head is built; the anchor needs none, the backbone's prediction is its own.
    """

    reads_images: ClassVar[bool] = True
    pixelwise: ClassVar[bool] = True
    are_images: ClassVar[bool] = True
    free_settings: ClassVar[frozenset[str]] = frozenset({"scale", "space", "autoencoder", *LATENT})

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
        latent_scale: Literal["config", "measured"] | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        latent_draw: bool = False,
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
        self.latent_scale, self.latent_draw = latent_scale, latent_draw
        self._measured = given_scale(latents_mean, latents_std, shape.space[0]) if self.latent else None
        self._frozen: list[ModelMixin] = []  # in a list: no submodule, so neither trained nor saved
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
    def frozen(self) -> ModelMixin | None:
        """The autoencoder of a latent anchor, loaded on first use."""
        if self.latent and not self._frozen:
            self.attach(latents.load_autoencoder(self.autoencoder))
        return self._frozen[0] if self._frozen else None

    def attach(self, autoencoder: ModelMixin) -> None:
        """Use this autoencoder instead of loading the one that was named.

        Raises:
            InputError: it does not read these images.
        """
        latents.check_images(autoencoder, self.value_shape)
        self._frozen[:] = [autoencoder.requires_grad_(False).eval()]
        self._encoded = None

    @classmethod
    def settings_from_files(
        cls, space: str = "pixel", autoencoder: str | None = None, **settings: Any
    ) -> dict[str, Any]:
        if space != "latent" or autoencoder is None or {"latent_channels", "latent_factor"} <= set(settings):
            return {}
        channels, factor = latents.latent_space(autoencoder)
        cls_, config = latents.read_config(autoencoder)
        unscaled = scale_of_config(cls_.__name__, config) is None
        measured = {"latent_scale": "measured"} if unscaled else {}
        return {"latent_channels": channels, "latent_factor": factor, **measured}

    @classmethod
    def settings_from_data(
        cls, feature: Any, values: Iterable[Any], channels: int | None = None, size: Any = None, **settings: Any
    ) -> dict[str, Any]:
        measured: dict[str, Any] = {}
        if channels is None or size is None:
            channel_counts, sizes = headers("image", values)
            if not channel_counts:
                raise InputError("image", None, "the column holds no image; check data.columns")
            measured = {"channels": channel_counts[0]}
            if size is None:
                measured["size"] = one_size("image", sizes)
        if settings.get("latent_scale") == "measured" and settings.get("latents_std") is None:
            stated = {name: value for name, value in (("channels", channels), ("size", size)) if value is not None}
            measured |= cls._measure(values, **{**measured, **stated}, **settings)
        return measured

    @classmethod
    def _measure(cls, values: Iterable[Any], **settings: Any) -> dict[str, list[float]]:
        """Mean and standard deviation of the latents of evenly spaced images."""
        image = cls(Shape(cls.diffusion_space(**settings), 1, 1), head=False, **settings)
        return measure(values, image.preprocess, image.posterior)

    @classmethod
    def check_readable(cls, raw: Any) -> None:
        header("image", raw)

    def size_of(self, raw: Any) -> tuple[int, int]:
        return header("image", raw)[1]

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
        shift, factor = self._scale().to(encoding.device)
        network = self.frozen.to(encoding.device)
        return latents.decode(network, encoding / (self.scale * factor) + shift).to(encoding.dtype)

    def _scale(self) -> Scale:
        """What brings latents to unit scale.

        Raises:
            InputError: nothing says it.
        """
        name, config = type(self.frozen).__name__, self.frozen.config
        scale = self._measured or (None if self.latent_scale == "measured" else scale_of_config(name, config))
        if scale is None:
            remedy = "the autoencoder's config has none; set latent_scale: measured, or latents_mean and latents_std"
            raise InputError("latent_scale", self.latent_scale, remedy)
        return scale

    @torch.no_grad()
    def posterior(self, value: Tensor) -> latents.Posterior:
        """(B, channels, height, width) -> the autoencoder's latents, not scaled."""
        return latents.encode(self.frozen.to(value.device), value)

    def frozen_encoding(self, value: Tensor) -> Tensor | None:
        """Mean and log-variance of the autoencoder's posterior, or its latents where it has no variance."""
        return self.posterior(value).joined() if self.latent else None

    def blank(self, count: int, device: torch.device) -> Tensor:
        missing = self.placeholder().to(device).expand(count, *self.value_shape).contiguous()
        return self.posterior(missing).joined()[:1]

    def prepare(self, value: Tensor, noise: Callable[[tuple[int, ...]], Tensor], stored: Tensor | None = None) -> None:
        """Remember stored latents, or a fresh draw of the posterior if one is asked for."""
        if self.latent and (stored is not None or self.latent_draw):
            channels = self.shape.space[0]
            posterior = self.posterior(value) if stored is None else latents.Posterior.parted(stored, channels)
            drawn = posterior.draw(noise(posterior.mean.shape[1:]) if self.latent_draw else None)
            self._remember(value, drawn)

    def _remember(self, value: Tensor, drawn: Tensor) -> None:
        """The latents of a batch, brought to unit scale."""
        shift, factor = self._scale().to(drawn.device)
        self._encoded = value, ((drawn - shift) * factor).to(value.dtype)

    def _latents(self, value: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, C, H, W): the mode of the autoencoder's posterior, brought to unit scale.

        One batch is remembered: a training step asks for it as z_0 and as an observation.
        """
        if self._encoded is None or self._encoded[0] is not value:
            self._remember(value, self.posterior(value).mean)
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

    def expected_signal(self, params: Tensor) -> Tensor:
        return self.observe(params[:, :-1])


def _rgb(background: Background) -> tuple[int, int, int]:
    colour = tuple(background) if isinstance(background, list | tuple) else (background,) * 3
    if len(colour) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in colour):
        raise InputError("background", background, "needs one grey or three RGB numbers, 0 … 255")
    return colour
