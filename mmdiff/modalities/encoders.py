"""Networks that encode one image of a set: images (N, channels, height, width) in [−1, 1] -> features (N, d)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mmdiff.clip import check_listed, load_clip
from mmdiff.errors import InputError
from mmdiff.modalities.import_path import imported
from mmdiff.trust import is_custom

POOLS = ("avg", "max", "catavgmax")


class ImageEncoder(nn.Module):
    """A network, and how many numbers it gives.

    Args:
        network: images -> features (N, d).
        channels, size: of the images.
    """

    def __init__(self, network: nn.Module, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.network = network
        training = network.training
        with torch.no_grad():
            features = network.eval()(torch.zeros(2, channels, *size))
        network.train(training)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
            actual = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError("encoder", actual, "two images need features of shape (2, d)")
        self.width = features.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """(N, channels, h, w) -> (N, d): computed in the precision of the weights, given in that of the images."""
        own = next(iter(self.network.parameters()), images).dtype
        return self.network(images.to(own)).to(images.dtype)

    def load_initial_weights(self) -> None:
        """Read pretrained weights where the network names some."""
        if isinstance(self.network, ClipTower):
            self.network.load_initial_weights()


class ClipTower(nn.Module):
    """The visual tower of a model of open_clip; images of another size are resized.

    Args:
        channels: must be 3.
        model: its name in open_clip.
        pretrained: a tag of open_clip or a local checkpoint, read where a run starts; None: weights drawn at random.
        frozen: whether it stays as it is.
    """

    def __init__(self, channels: int, model: str, pretrained: str | None = None, frozen: bool = False) -> None:
        super().__init__()
        import open_clip

        if channels != 3:
            raise InputError("encoder.kind", "open_clip", f"reads 3 channels, the images have {channels}")
        check_listed("encoder.model", model)  # never a folder or repository, whose config may name code
        self.model, self.pretrained, self.frozen = model, pretrained, frozen
        self.tower = open_clip.create_model(model).visual.requires_grad_(not frozen)
        size = self.tower.image_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        for name, values in (("mean", self.tower.image_mean), ("std", self.tower.image_std)):
            default = open_clip.OPENAI_DATASET_MEAN if name == "mean" else open_clip.OPENAI_DATASET_STD
            self.register_buffer(name, torch.tensor(values or default)[:, None, None], persistent=False)

    def load_initial_weights(self) -> None:
        """Read the weights that were named."""
        if self.pretrained is None:
            return
        clip, _ = load_clip("encoder", self.model, self.pretrained, "cpu")
        self.tower.load_state_dict(clip.visual.state_dict())

    def train(self, mode: bool = True) -> ClipTower:
        """A frozen tower stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2:] != self.size:
            images = interpolate(images, self.size, mode="bicubic", antialias=True, align_corners=False)
        return self.tower(((images + 1) / 2 - self.mean.to(images)) / self.std.to(images))


def small_resnet(channels: int, name: str = "resnet18", widths: tuple[int, ...] = (16, 32, 64, 128)) -> nn.Module:
    """A ResNet of timm without weights, for small images.

    Normalised by groups, as a batch must not decide what an image means; one block per stage.

    Args:
        channels: of the images.
        name: of a ResNet of timm with basic blocks.
        widths: channels of its four stages.
    """
    import timm

    if not timm.is_model(name):
        raise InputError("encoder.name", name, "no model of timm; see timm.list_models('resnet*')")
    settings = {"channels": tuple(widths), "layers": (1,) * len(widths), "stem_width": widths[0]}
    more = {"norm_layer": _by_groups, "zero_init_last": False}  # else half of the layers start without gradients
    try:
        return timm.create_model(name, in_chans=channels, num_classes=0, **settings, **more)
    except TypeError as error:
        raise InputError("encoder.name", name, f"is no ResNet of timm: {error}") from None


class Convolutions(nn.Module):
    """Two convolutions of 3×3 pixels per width, the first of which halves the size; pooled over space after each width.

    The early ones tell of surfaces, which a network that learns shapes soon forgets.

    Args:
        channels: of the images.
        widths: channels of the stages.
        pool: timm's name of what is taken over space: "avg", "max" or "catavgmax", both. The largest values say whether
            something small is anywhere, such as the one corner in sight.
    """

    def __init__(self, channels: int, widths: tuple[int, ...] = (32, 64, 128), pool: str = "avg") -> None:
        super().__init__()
        from timm.layers import SelectAdaptivePool2d

        if pool not in POOLS:
            raise InputError("encoder.pool", pool, f"choose one of {', '.join(POOLS)}")
        self.pool = SelectAdaptivePool2d(pool_type=pool, flatten=True)
        self.stages = nn.ModuleList()
        for before, width in zip((channels, *widths), widths):
            layers: list[nn.Module] = []
            for inner, stride in ((before, 2), (width, 1)):
                layers += [nn.Conv2d(inner, width, 3, stride, padding=1, bias=False), _by_groups(width), nn.ReLU()]
            self.stages.append(nn.Sequential(*layers))

    def forward(self, images: Tensor) -> Tensor:
        features = []
        for stage in self.stages:
            images = stage(images)
            features.append(self.pool(images))
        return torch.cat(features, dim=1)  # (N, sum of the widths), twice as many for both


def _by_groups(channels: int, **_: Any) -> nn.Module:
    """Normalisation of groups of eight channels: on image sets of shapes it learns faster than one group of all."""
    return nn.GroupNorm(channels // math.gcd(8, channels), channels)


ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "resnet": small_resnet,
    "convolutions": Convolutions,
    "open_clip": ClipTower,
}


def _makes_module(key: str, path: str) -> Callable[..., nn.Module]:
    """What an import path names, which must promise a module before it is called.

    Raises:
        InputError: it is neither a subclass of `nn.Module` nor a function that is annotated to return one.
    """
    maker = imported(key, path)
    returned = maker
    if isinstance(maker, FunctionType):
        try:
            returned = get_type_hints(maker).get("return")
        except Exception:  # annotations are code of others
            returned = None
    if not (isinstance(returned, type) and issubclass(returned, nn.Module)):
        remedy = "must be a subclass of torch.nn.Module, or a function annotated to return one: -> nn.Module"
        raise InputError(key, path, f"{remedy}; nothing of it was called")
    return maker


def build_encoder(config: Mapping[str, Any], channels: int, size: tuple[int, int]) -> ImageEncoder:
    """The network that a config names.

    Args:
        config: ``kind``, a key of `ENCODERS` or the import path of a subclass of `nn.Module`, or of a function that
            is annotated to return one, and further arguments of it. Those of `ENCODERS` get ``channels`` too.
        channels, size: of the images.

    Raises:
        InputError: when there is none such, or its arguments or its output do not fit.
    """
    settings = {name: value for name, value in config.items() if name != "kind"}
    kind = config.get("kind")
    if kind in ENCODERS:
        make, settings = ENCODERS[kind], {"channels": channels, **settings}
    elif is_custom(kind):
        make = _makes_module("encoder.kind", kind)
    else:
        known = ", ".join(ENCODERS)
        raise InputError("encoder.kind", kind, f"choose one of {known}, or write an import path: my_pkg.vision:Encoder")
    try:
        network = make(**settings)
    except TypeError as error:
        raise InputError("encoder", dict(config), f"its settings do not fit: {error}") from None
    if not isinstance(network, nn.Module):
        raise InputError("encoder.kind", kind, f"gives {type(network).__name__}, needs a torch.nn.Module")
    return ImageEncoder(network, channels, size)
