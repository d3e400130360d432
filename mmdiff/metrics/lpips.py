"""LPIPS (Zhang et al., 2018) of whole images and of holes, with official weights or a local backbone."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any, Literal

import lpips
import torch
import torchvision
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.metrics.features import SMALLEST, at_least, coloured, load_trunk, read_state, read_trunk
from mmdiff.trust import offline

VERSION = "0.1"
_BATCH = 64
_TRUNKS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}
_LOCAL = (
    "name local files instead: evaluate.lpips.backbone=PATH (a state dict of that trunk) and, if need be, "
    "evaluate.lpips.heads=PATH"
)


class Perceptual:
    """LPIPS v0.1 of pairs of images (n, C, H, W), C = 1 or 3, in [−1, 1].

    Grey images are repeated to 3 channels; images smaller than `SMALLEST` pixels are enlarged (bilinear).

    Args:
        net: the trunk.
        backbone: a local state dict with torchvision's names for that trunk; without it torchvision's own weights are
            taken, and downloaded where they are not on disk.
        heads: a local file of the linear heads; without it those that the lpips package ships.

    Raises:
        InputError: the weights cannot be had, or the files do not fit.
    """

    def __init__(
        self,
        net: Literal["alex", "vgg", "squeeze"] = "alex",
        backbone: Path | None = None,
        heads: Path | None = None,
    ) -> None:
        self._net = net
        self._backbone = None if backbone is None else Path(backbone)
        self._heads = None if heads is None else Path(heads)
        self._network = _network(net, official=backbone is None).requires_grad_(False)
        if self._backbone:
            _load_backbone(self._network, self._backbone)
        if self._heads:
            _load_heads(self._network, self._heads)

    @property
    def name(self) -> str:
        """For manifests: "LPIPS-alex v0.1", "LPIPS-squeeze-caffe", "LPIPS-squeeze (backbone mine)"."""
        if self._backbone is None:
            return f"LPIPS-{self._net} v{VERSION}"
        if "caffe" in self._backbone.name:
            return f"LPIPS-{self._net}-caffe"
        return f"LPIPS-{self._net} (backbone {self._backbone.stem})"

    def facts(self) -> dict[str, Any]:
        """For manifests: where the weights come from, and what was done to the images."""
        return {
            "LPIPS": self.name,
            "LPIPS net": self._net,
            "LPIPS version": VERSION,
            "LPIPS backbone": _identity(self._backbone) if self._backbone else "torchvision",
            "LPIPS heads": _identity(self._heads) if self._heads else "official",
            "LPIPS sizes": f"smaller images enlarged to {SMALLEST} px (bilinear)",
            "LPIPS range": "[-1, 1]",
        }

    def whole(self, images: Tensor, truth: Tensor) -> Tensor:
        """The official score of each pair, (n,) on the CPU; 0 for equal images."""
        pairs = zip(images.split(_BATCH), truth.split(_BATCH), strict=True)
        return torch.cat([self._score(a, b, spatial=False).flatten() for a, b in pairs]).cpu()

    def hole(self, images: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
        """The mean of the spatial map over the pixels that count, (n,) on the CPU.

        The map has the size of the (enlarged) image; a mask is enlarged with it (nearest).

        Args:
            images, truth: (n, C, H, W).
            mask: (n, 1, H, W), 1 = counts.

        Raises:
            InputError: in some image no pixel counts.
        """
        if not mask.flatten(1).any(1).all():
            raise InputError("evaluate.lpips", 0, "an image without pixels that count has no score; leave it out")
        parts = []
        for a, b, pixels in zip(images.split(_BATCH), truth.split(_BATCH), mask.split(_BATCH), strict=True):
            weights = at_least(pixels.float(), SMALLEST, mode="nearest-exact")
            distance = self._score(a, b, spatial=True) * weights  # (b, 1, h, w)
            parts.append(distance.sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3)))
        return torch.cat(parts).cpu()

    @torch.no_grad()
    def _score(self, images: Tensor, truth: Tensor, spatial: bool) -> Tensor:
        """(b, C, H, W) twice -> (b, 1, 1, 1), or (b, 1, h, w) at the enlarged size."""
        self._network.to(images.device).spatial = spatial
        return self._network(*(at_least(coloured(x.float()), SMALLEST) for x in (images, truth)))


def _network(net: str, official: bool) -> lpips.LPIPS:
    """In evaluation mode; without the official trunk, and offline, nothing is downloaded."""
    weights = getattr(torchvision.models, _TRUNKS[net]).IMAGENET1K_V1
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if official and offline() and not file.is_file():
        remedy = f"torchvision's weights cannot be had offline ({file.name}); {_LOCAL}"
        raise InputError("evaluate.lpips.net", net, remedy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision in its old way
        try:
            return lpips.LPIPS(net=net, version=VERSION, pnet_rand=not official, verbose=False)
        except (OSError, RuntimeError) as error:
            remedy = f"torchvision's weights cannot be had ({error}); {_LOCAL}"
            raise InputError("evaluate.lpips.net", net, remedy) from error


def _load_backbone(network: lpips.LPIPS, file: Path) -> None:
    trunk = read_trunk(file, "evaluate.lpips.backbone")
    # lpips cuts torchvision's features into slices but keeps their numbers: "slice2.3.squeeze.weight" is "3.squeeze.…"
    slices = {name.split(".", 1)[1]: name for name in network.net.state_dict()}
    renamed = {slices.get(name, name): value for name, value in trunk.items()}
    load_trunk(network.net, renamed, file, "evaluate.lpips.backbone")


def _load_heads(network: lpips.LPIPS, file: Path) -> None:
    heads = read_state(file, "evaluate.lpips.heads")
    renamed = {name.removeprefix("lin"): value for name, value in heads.items()}  # "lin0.model.1.weight"
    load_trunk(network.lins, renamed, file, "evaluate.lpips.heads")


def _identity(file: Path) -> str:
    """The file's name and the start of its SHA-256."""
    return f"{file.name} (sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:12]})"
