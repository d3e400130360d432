"""Representation alignment (REPA; Yu et al., 2025, arXiv 2410.06940): the backbone's features against those of a frozen
image encoder, by a projector that only training has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from einops import EinopsError
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mmdiff.backbones import BackboneOutput
from mmdiff.clip import load_clip
from mmdiff.errors import InputError
from mmdiff.losses import misalignment
from mmdiff.model import MTDiffusionModel

TIMM = "timm:"  # prefix of encoders of timm; all others are open_clip's
_EXAMPLE = "vit_small_patch14_dinov2.lvd142m"
#: network; pixels -> its features (B, K, h, w); size, mean and standard deviation of the pixels it reads
_Encoder = tuple[nn.Module, Callable[[Tensor], Tensor], tuple[Any, Any, Any]]


class Teacher:
    """A frozen image encoder in evaluation mode. It is no module: it is neither trained, averaged nor saved.

    Args:
        model: of open_clip as of `mmdiff.clip.load_clip`, or "timm:NAME".
        pretrained: a tag or a local file of its weights.

    Raises:
        InputError: naming model or pretrained.
    """

    def __init__(self, model: str, pretrained: str | None) -> None:
        load = _timm if model.startswith(TIMM) else _open_clip
        self.network, self._features, (size, mean, std) = load(model, pretrained)
        self.network.eval().requires_grad_(False)
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.mean, self.std = (torch.tensor(numbers)[:, None, None] for numbers in (mean, std))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, h, w) in [−1, 1] -> features of the last layer, normalised by it, (B, K, h', w')."""
        if next(self.network.parameters()).device != images.device:
            self.network.to(images.device)
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        images = images.float().expand(-1, 3, -1, -1)
        if images.shape[2:] != self.size:
            images = interpolate(images, self.size, mode="bicubic", antialias=True, align_corners=False)
        return self._features(((images + 1) / 2 - self.mean) / self.std)


def _open_clip(model: str, pretrained: str | None) -> _Encoder:
    import open_clip

    try:
        clip, _ = load_clip("", model, pretrained, "cpu")
    except InputError as error:
        raise InputError(error.key.removeprefix("."), error.value, error.remedy) from None
    tower = clip.visual
    if not hasattr(tower, "forward_intermediates"):
        raise InputError("model", model, "its image tower gives no features of places; choose a ViT or a ResNet")
    options = {"indices": 1, "normalize_intermediates": True, "intermediates_only": True, "output_fmt": "NCHW"}
    mean, std = tower.image_mean or open_clip.OPENAI_DATASET_MEAN, tower.image_std or open_clip.OPENAI_DATASET_STD
    return (
        tower,
        lambda images: tower.forward_intermediates(images, **options)["image_intermediates"][-1],
        (tower.image_size, mean, std),
    )


def _timm(model: str, pretrained: str | None) -> _Encoder:
    import timm

    name, overlay = model.removeprefix(TIMM), {}
    if not timm.is_model(name.partition(".")[0]):
        raise InputError("model", model, f"no model of timm; one is {TIMM}{_EXAMPLE}")
    if pretrained is not None:
        if not (pretrained.endswith(".safetensors") and Path(pretrained).is_file()):
            raise InputError("pretrained", pretrained, "is no safetensors file here; null loads the weights timm names")
        overlay = {"pretrained_cfg_overlay": {"file": pretrained}}
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0, **overlay)
        data = timm.data.resolve_model_data_config(network)
        network.forward_intermediates  # noqa: B018 (some models of timm lack it)
    except Exception as error:  # downloads and checkpoints fail in many ways
        culprit, value = ("pretrained", pretrained) if pretrained else ("model", model)
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(culprit, value, f"the weights of {model} cannot be loaded ({reason})") from None
    options = {"indices": 1, "norm": True, "intermediates_only": True, "output_fmt": "NCHW"}
    return (
        network,
        lambda images: network.forward_intermediates(images, **options)[-1],
        (data["input_size"][1:], data["mean"], data["std"]),
    )


class Alignment(nn.Module):
    """The term `repa`: minus the cosine between projected features of the backbone and the teacher's, Eq. (24).

    Args:
        network: the model; its anchor must be an image.
        model, pretrained: see `Teacher`.
        weight: coefficient of the term.
        layer: number of the backbone's block whose output is aligned; None: `BackboneOutput.features`.
        until: the step from which the term is gone (Wang et al., 2025, arXiv 2505.16792); 0: it stays.
        teacher: "own", or "shuffled": the encoder sees the image of the row's neighbour.

    Raises:
        InputError: naming an argument.
    """

    def __init__(
        self,
        network: MTDiffusionModel,
        model: str,
        pretrained: str | None,
        weight: float = 0.5,
        layer: int | None = None,
        until: int = 0,
        teacher: str = "own",
    ) -> None:
        super().__init__()
        self.weight, self.until, self.shuffled = weight, until, teacher == "shuffled"
        anchor = network.modalities[network.anchor]
        if not anchor.reads_images or anchor.value_shape[0] not in (1, 3):
            raise InputError("model", model, f"encodes grey or RGB images, the anchor {network.anchor} is none")
        self.teacher = Teacher(model, pretrained)
        blocks = network.backbone.blocks()
        if layer is not None and layer >= len(blocks):
            raise InputError("layer", layer, f"the backbone has {len(blocks)} blocks, counted from 0")
        self._seen: Any = None  # what the hook saw last
        source = network.backbone if layer is None else blocks[layer]
        self._read = _features if layer is None else network.backbone.map_of
        source.register_forward_hook(self._look)
        width, targets = self._probe(network, layer), self.teacher(torch.zeros(1, 3, *self.teacher.size)).shape[1]
        self.projector = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 1),
            nn.SiLU(),
            nn.Conv2d(2 * width, targets, 1),
        )

    def _look(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._seen = output

    def _probe(self, network: MTDiffusionModel, layer: int | None) -> int:
        """Channels of the features, which must cover all places in training too."""
        z = torch.zeros(1, *network.space)
        observation = network.observation({}, {}, {}, like=z)
        count = network.backbone.random_numbers(*network.space[1:])
        drawn = observation._replace(random=torch.rand(1, count) if count else None)
        modes = {module: module.training for module in network.modules()}
        with torch.no_grad():
            network.eval()(z, torch.zeros(1, dtype=torch.int64), drawn)
        for module, training in modes.items():
            module.training = training
        try:
            return self._read(self._seen, *network.space[1:]).shape[1]
        except (EinopsError, IndexError):
            raise InputError("layer", layer, "does not give a map of all places in training; choose another") from None

    def forward(
        self, images: Tensor, size: tuple[int, int], counts: Tensor, step: int, neighbours: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        """{"repa": (B,)}, after the model was called for the same rows.

        From the step ``until`` on it is 0 without gradients, but for the projector's, which are zeros: data parallelism
        asks for one of every parameter.

        Args:
            images: the anchor's values, (B, C, height, width) in [−1, 1].
            size: (H, W) of the diffusion space.
            counts: (B,) bool, the rows whose image is denoised.
            step: of the run, from 0.
            neighbours: gives the index of each row's neighbour.
        """
        seen, self._seen = self._seen, None
        if self.until and step >= self.until:
            return {"repa": 0.0 * sum(p.sum() for p in self.projector.parameters()).expand(len(images))}
        targets = self.teacher(images[neighbours()] if self.shuffled else images)  # (B, K, h', w')
        projected = self.projector(self._read(seen, *size))  # (B, K, h, w)
        if targets.shape[2:] != projected.shape[2:]:
            targets = interpolate(targets, projected.shape[2:], mode="bilinear", antialias=True, align_corners=False)
        return {"repa": misalignment(projected, targets) * counts}


def _features(output: BackboneOutput, height: int, width: int) -> Tensor:
    return output.features
