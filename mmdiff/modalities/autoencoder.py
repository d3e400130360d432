"""Frozen autoencoders of diffusers: what makes an image a latent, and a latent an image.

Which class a folder holds its `config.json` says. The number of latent channels and the compression factor are those of
an example that passes through the class without weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.models import autoencoders
from torch import Generator, Tensor

from mmdiff.errors import InputError

_EXAMPLE = 256  # pixels of the side of the example
_DAMAGE = (OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError, ImportError)


class Family(NamedTuple):
    """How a class wants its images."""

    frames: bool = False  # as videos of one frame, (B, C, 1, H, W)
    alpha: bool = False  # with a fourth channel, opaque
    low: float = -1.0  # its images lie in low … 1
    scaled: bool = False  # its latents are scaled already


#: {class of diffusers that reads images: how}
FAMILIES: dict[str, Family] = {
    "AsymmetricAutoencoderKL": Family(),
    "AutoencoderDC": Family(),
    "AutoencoderKL": Family(),
    "AutoencoderKLFlux2": Family(),
    "AutoencoderKLHunyuanImage": Family(),
    "AutoencoderKLHunyuanImageRefiner": Family(frames=True),
    "AutoencoderKLKVAE": Family(),
    "AutoencoderKLQwenImage": Family(frames=True),
    "AutoencoderKLQwenImage21": Family(frames=True, alpha=True),
    "AutoencoderRAE": Family(low=0.0, scaled=True),
    "AutoencoderTiny": Family(),
    "ConsistencyDecoderVAE": Family(),
    "VQModel": Family(),
}


class Posterior(NamedTuple):
    """Latents of images before they are scaled: ``mean`` (B, C, h, w), and ``logvar`` of the same shape, or None."""

    mean: Tensor
    logvar: Tensor | None

    def draw(self, noise: Tensor | None) -> Tensor:
        """A latent from standard normal noise; None, or no variance: the mode."""
        if noise is None or self.logvar is None:
            return self.mean
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def joined(self) -> Tensor:
        """(B, C or 2 C, h, w): the mean, and beside it the log-variance where there is one."""
        return self.mean if self.logvar is None else torch.cat([self.mean, self.logvar], dim=1)

    @classmethod
    def parted(cls, joined: Tensor, channels: int) -> Posterior:
        """What `joined` gave, of latents with so many channels."""
        return cls(joined[:, :channels], joined[:, channels:] if joined.shape[1] > channels else None)


def find_autoencoder(name: Any, key: str = "autoencoder") -> type[ModelMixin]:
    """The class of a name; code that a folder brings is never looked at.

    Raises:
        InputError: it is no autoencoder of diffusers, or one of videos or sounds.
    """
    family = getattr(diffusers, name, None) if isinstance(name, str) and name in FAMILIES else None
    if family is not None:
        return family
    if isinstance(name, str) and hasattr(autoencoders, name):
        raise InputError(key, name, f"does not read images; these do: {', '.join(FAMILIES)}")
    raise InputError(key, name, f"is no autoencoder of diffusers; it has {', '.join(FAMILIES)}")


def read_config(source: str, **hub: Any) -> tuple[type[ModelMixin], dict[str, Any]]:
    """(class, config) of a folder or a hub repository, without its weights.

    Raises:
        InputError: it cannot be read, or is of another class.
    """
    try:
        config = diffusers.AutoencoderKL.load_config(source, **hub)
    except _DAMAGE as error:
        raise InputError("autoencoder", source, f"cannot be read: {_said(error)}") from None
    if not isinstance(config, Mapping):
        raise InputError("autoencoder", source, "its config.json is no mapping")
    try:
        return find_autoencoder(config.get("_class_name")), dict(config)
    except InputError as error:
        raise InputError("autoencoder", source, f"its class {error.value} {error.remedy}") from None


def load_autoencoder(source: str, **arguments: Any) -> ModelMixin:
    """The network of a folder or a hub repository.

    Args:
        source: the folder or repository.
        arguments: of `from_pretrained`.

    Raises:
        InputError: as of `read_config`; a tensor is missing, which would stay random.
    """
    hub = {name: value for name, value in arguments.items() if name != "use_safetensors"}
    cls, _ = read_config(source, **hub)
    try:
        with _quiet():
            network, loading = cls.from_pretrained(source, output_loading_info=True, **arguments)
    except _DAMAGE as error:
        raise InputError("autoencoder", source, f"cannot be read: {_said(error)}") from None
    if missing := sorted(loading["missing_keys"]):
        remedy = f"its weights lack {len(missing)} tensors of {cls.__name__}, such as {missing[0]}; save it again"
        raise InputError("autoencoder", source, remedy)
    return network


def latent_space(source: str) -> tuple[int, int]:
    """(latent channels C, compression factor: pixels of an image's side for one of a latent's).

    Raises:
        InputError: as of `read_config`; the class cannot be built from its config.
    """
    cls, config = read_config(source)
    try:
        with torch.device("meta"), torch.no_grad(), _quiet():
            network = cls.from_config(config).eval()
            side = getattr(network, "decoder_image_size", _EXAMPLE)  # of a transformer, which has one size
            latents = encode(network, torch.empty(1, image_channels(network), side, side)).mean
    except _DAMAGE as error:
        raise InputError("autoencoder", source, f"cannot be built from its config: {_said(error)}") from None
    return latents.shape[1], side // latents.shape[2]


def digest(network: ModelMixin) -> str:
    """A hash of the weights, the class and its settings; not of the folder they come from."""
    network = getattr(network, "_orig_mod", network)
    sha = hashlib.sha256(type(network).__name__.encode())
    settings = {name: value for name, value in network.config.items() if not name.startswith("_")}
    sha.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(network.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:32]


def image_channels(network: ModelMixin) -> int:
    """Channels of the images that a network reads."""
    config = network.config
    names = ("in_channels", "input_channels", "num_channels", "encoder_in_channels")
    channels = next((config[name] for name in names if name in config), 3)
    return channels - _family(network).alpha


def check_images(network: ModelMixin, shape: tuple[int, ...]) -> None:
    """Refuse images that a network does not read.

    Args:
        network: the autoencoder.
        shape: (channels, height, width) of the images.

    Raises:
        InputError: naming channels or size.
    """
    if shape[0] != image_channels(network):
        wanted = image_channels(network)
        raise InputError("channels", shape[0], f"the autoencoder reads images of {wanted}; set channels: {wanted}")
    side = getattr(network, "decoder_image_size", None)
    if side is not None and tuple(shape[1:]) != (side, side):
        raise InputError("size", tuple(shape[1:]), f"the autoencoder has one size; set size: {side}, resize: true")


def encode(network: ModelMixin, images: Tensor) -> Posterior:
    """Images (B, channels, H, W) in [−1, 1] as latents, in the network's dtype."""
    family = _family(network)
    images = images.to(network.dtype)
    if family.alpha:
        images = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
    if family.low != -1.0:
        images = (images + 1) * ((1 - family.low) / 2) + family.low
    output = network.encode(images.unsqueeze(2) if family.frames else images)
    if "latent_dist" not in output:
        return Posterior(output["latents" if "latents" in output else "latent"], None)
    mean, logvar = output.latent_dist.mode(), getattr(output.latent_dist, "logvar", None)
    if family.frames:
        mean, logvar = mean.squeeze(2), None if logvar is None else logvar.squeeze(2)
    return Posterior(mean, logvar)


def decode(network: ModelMixin, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w), not scaled, as images (B, channels, H, W) near [−1, 1].

    A decoder that draws noise is given the same for every image, so that a batch can be split.
    """
    family = _family(network)
    latents = latents.to(network.dtype)
    noise = {}
    if isinstance(network, diffusers.ConsistencyDecoderVAE):
        noise = {"generator": [Generator(latents.device).manual_seed(0) for _ in latents]}
    images = network.decode(latents.unsqueeze(2) if family.frames else latents, **noise).sample
    images = images.squeeze(2) if family.frames else images
    if family.low != -1.0:
        images = (images - family.low) * (2 / (1 - family.low)) - 1
    return images[:, :-1] if family.alpha else images


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of diffusers about keys that its own classes save and do not read."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(level)


def _family(network: ModelMixin) -> Family:
    return FAMILIES[type(getattr(network, "_orig_mod", network)).__name__]


def _said(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
