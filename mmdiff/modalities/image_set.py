"""Several photos of one thing: each is encoded, all are fused into one embedding (docs/theory.md, section 7)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image as PILImage
from PIL import ImageSequence
from torch import Generator, Tensor, nn
from torch.nn.functional import interpolate, linear, normalize

from mmdiff.augmentation import Change
from mmdiff.errors import InputError
from mmdiff.image_files import is_image
from mmdiff.modalities.base import Shape
from mmdiff.modalities.encoders import build_encoder
from mmdiff.modalities.files import open_image
from mmdiff.modalities.fusion import Fused, build_fusion
from mmdiff.modalities.grids import Size, height_width, repeatable
from mmdiff.modalities.heads import widened
from mmdiff.modalities.image import Background, Image
from mmdiff.modalities.query import Asked


class ImageSet(Asked):
    """A set of 1 to `max_images` images; its value is (max_images, channels + 1, height, width) float32.

    The images come first. The last channel is 1 for them and 0 for the empty places. As a raw value it is a list of
    images; None in the list is left out. An image set is a condition only, and `weights` says how much each image
    counted.

    Args:
        shape: the surroundings, see `Modality`.
        channels: of the images, see `Image`.
        size: of the images, see `Image`.
        max_images: largest number of images.
        resize: see `Image`.
        encoder: {kind: resnet} (a small one of timm), {kind: convolutions}, {kind: open_clip} or an import path, with
            its settings, see `mmdiff.modalities.encoders`.
        fusion: a key of `mmdiff.modalities.fusion.FUSIONS`: mean, max, attention, agreement_attention, …; with a query
            query_attention.
        dim: size of the fused embedding.
        hidden: width of the attentions' layer.
        observe_as: how a set reaches the backbone: "context" (the embedding) or "channels" (a map).
        map_size: side of the map's grid, repeated to the size of the diffusion space. Default: the full size.
        background: see `Image`.
        query: another modality; where it is observed, its context says which images matter.
    """

    reads_images: ClassVar[bool] = True
    query_weights: ClassVar[tuple[str, ...]] = ("fusion.W.weight",)

    def __init__(
        self,
        shape: Shape,
        channels: int,
        size: Size,
        max_images: int,
        resize: bool = False,
        encoder: Mapping[str, Any] | None = None,
        fusion: str = "attention",
        dim: int = 128,
        hidden: int = 128,
        observe_as: str = "context",
        map_size: int | None = None,
        background: Background = 255,
        query: str | None = None,
    ) -> None:
        super().__init__(shape, query)
        if max_images < 1:
            raise InputError("max_images", max_images, "a set has one image at least")
        if dim < 2:
            raise InputError("dim", dim, "a direction needs at least two dimensions")
        if observe_as not in ("channels", "context"):
            raise InputError("observe_as", observe_as, "choose channels or context")
        self.image = Image(shape, channels, size, resize, head=False, background=background)
        self.max_images, self.dim, self.by_context = max_images, dim, observe_as == "context"
        self.encoder = build_encoder(encoder or {"kind": "resnet"}, channels, height_width(size))
        self.project = nn.Linear(self.encoder.width, dim)
        self.fusion = build_fusion(fusion, dim, hidden, None if query is None else self.query_dim)
        self.grid = (shape.space[0], *repeatable("map_size", map_size, shape.space))
        # fixed: what stands before it is learned
        self.register_buffer("map", nn.init.orthogonal_(torch.empty(math.prod(self.grid), dim)))

    def load_initial_weights(self) -> None:
        self.encoder.load_initial_weights()

    # ------------------------------------------------------------------------------------------------ data <-> value

    @classmethod
    def settings_from_data(cls, feature: Any, values: Iterable[Any], **settings: Any) -> dict[str, Any]:
        if {"channels", "size", "max_images"} <= set(settings):
            return {}
        sets = [_members(raw) for raw in values]
        images = [image for members in sets for image in members]
        if not images:
            raise InputError("image_set", None, "the column holds no lists of images; check data.columns")
        return {**Image.settings_from_data(None, images, **settings), "max_images": max(map(len, sets))}

    @classmethod
    def check_readable(cls, raw: Any) -> None:
        for image in _members(raw):
            Image.check_readable(image)

    def preprocess(self, raw: Any) -> Tensor:
        if isinstance(raw, PILImage.Image):
            raise InputError("image_set", "one image", "needs a list of images; one set alone is [[photo, photo]]")
        members = _members(raw)
        if not 1 <= len(members) <= self.max_images:
            raise InputError("image_set", f"{len(members)} images", f"needs 1 … {self.max_images}; see max_images")
        value = torch.zeros(self.value_shape)
        for place, image in enumerate(members):
            value[place, :-1], value[place, -1] = self.image.preprocess(image), 1.0
        return value

    def parse(self, text: str) -> list[PILImage.Image]:
        """Image files with commas, a folder of them, or one file with several pages."""
        path = Path(text)
        if path.is_dir():
            files = sorted(str(file) for file in path.iterdir() if is_image(file))
            if not files:
                raise InputError("image_set", text, "holds no image")
        else:
            files = [text] if path.is_file() else text.split(",")
        return [self.image.fitted(page) for file in files for page in _pages(file)]

    def save(self, output: list[PILImage.Image], stem: Path) -> Path:
        """As the pages of one TIFF."""
        path = stem.with_name(f"{stem.name}.tiff")
        output[0].save(path, save_all=True, append_images=output[1:])
        return path

    def check(self, value: Tensor) -> None:
        super().check(value)
        there = value[:, :, -1]
        if not (((there == 0) | (there == 1)).all() and (there == there[..., :1, :1]).all()):
            raise InputError("image_set", "its last channel", "must be 1 where an image is and 0 elsewhere")
        if not (there[:, 0].all() and (there.diff(dim=1) <= 0).all()):
            raise InputError("image_set", "a set", "needs one image at least, and its images before what is empty")

    def postprocess(self, value: Tensor) -> list[list[PILImage.Image]]:
        """The images of every set."""
        counts = (value[:, :, -1, 0, 0] > 0).sum(dim=1).tolist()
        return [self.image.postprocess(images[:count, :-1]) for images, count in zip(value, counts, strict=True)]

    @property
    def value_shape(self) -> tuple[int, ...]:
        channels, height, width = self.image.value_shape
        return self.max_images, channels + 1, height, width

    def placeholder(self) -> Tensor:
        value = torch.zeros(self.value_shape)
        value[0, -1] = 1.0
        return value

    def follow(self, value: Tensor, change: Change) -> Tensor:
        """All images alike: a mirrored or recoloured thing looks so in every photo."""
        images, there = value[:, :-1], value[:, -1:]
        return torch.cat([self.image.follow(images, change) * there, there], dim=1)

    def examples(self, count: int, generator: Generator) -> Tensor:
        value = torch.rand(count, *self.value_shape, generator=generator) * 2 - 1
        sizes = torch.randint(1, self.max_images + 1, (count,), generator=generator)
        there = (torch.arange(self.max_images) < sizes[:, None])[:, :, None, None, None].float()
        return torch.cat([(value[:, :, :-1] * 127.5).round() / 127.5 * there, there.expand_as(value[:, :, -1:])], dim=2)

    # -------------------------------------------------------------------------------------------- value -> diffusion

    def fuse(self, value: Tensor) -> Fused:
        """(B, n, channels + 1, h, w) -> embeddings (B, d) and weights (B, n)."""
        there = value[:, :, -1, 0, 0] > 0  # (B, n)
        features = self.encoder(value[:, :, :-1][there])  # (N, width), of the members only
        members = linear(features, widened(self.project.weight), widened(self.project.bias))
        placed = members.new_zeros(*there.shape, self.dim).masked_scatter(there[..., None], members)  # (B, n, d)
        return self.fusion(placed, there, self.question(like=placed))

    def weights(self, value: Tensor) -> Tensor:
        return self.fuse(value).weights

    def encode(self, value: Tensor) -> Tensor:
        mapped = linear(normalize(self.fuse(value).embedding, dim=1), widened(self.map))  # (B, C · rows · columns)
        mapped = mapped / mapped.square().mean(dim=1, keepdim=True).add(1e-12).sqrt()
        return interpolate(mapped.reshape(-1, *self.grid), self.shape.space[1:], mode="nearest")

    @property
    def observation_channels(self) -> int:
        return 0 if self.by_context else super().observation_channels

    @property
    def context_width(self) -> int:
        return self.dim if self.by_context else 0

    def context(self, value: Tensor) -> Tensor:
        """The direction of the fused embedding."""
        if not self.by_context:
            return super().context(value)
        return normalize(self.fuse(value).embedding, dim=1) * math.sqrt(self.dim)  # unit scale per number


def _members(raw: Any) -> list[Any]:
    """The images that are there."""
    if raw is not None and not isinstance(raw, list | tuple):
        raise InputError("image_set", type(raw).__name__, "is no list of images; check data.columns")
    return [image for image in raw or () if image is not None]


def _pages(text: str) -> list[PILImage.Image]:
    first = open_image("image_set", text)
    with PILImage.open(text) as file:
        pages = [page.copy() for page in ImageSequence.Iterator(file)]
    return [first, *pages[1:]]
