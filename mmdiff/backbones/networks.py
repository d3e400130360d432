"""Networks of diffusers as backbones: built from their complete config, which every saved model holds.

What a network does not have, observations and flags, enters through layers of its own that start at zero. They add
exactly 0 to what the network computes, so that with its pretrained weights the first prediction is its own, bit by bit.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from mmdiff.backbones.attention import attention_layers
from mmdiff.backbones.base import Backbone, Observation
from mmdiff.errors import InputError
from mmdiff.trust import refuse_huge

KEY = "backbone.network"
_ERRORS = (ValueError, TypeError, LookupError, RuntimeError, AttributeError, ArithmeticError, NotImplementedError)
_OFF = (None, False, "default")  # values of settings of older classes, which switch nothing on


class NetworkBackbone(Backbone):
    """A backbone around a network of diffusers, whose parameters keep their names.

    Args:
        space, observation_channels, flag_widths: see `Backbone`.
        network: the config of the network.
    """

    network_class: ClassVar[type[ModelMixin]]
    modality_parts = ("flags.", "observe.", "place.", "grid.")

    def __init__(
        self,
        space: tuple[int, int, int],
        observation_channels: int,
        flag_widths: Sequence[int],
        network: dict[str, Any],
    ) -> None:
        super().__init__(space, observation_channels, flag_widths)
        self.channels = space[0]
        check_channels(complete_config(self.network_class, network), self.channels)
        self.network = build_network(self.network_class, network)
        self.space, self.inputs = space, (observation_channels, sum(flag_widths))

    def attention_layers(self) -> list[str]:
        return attention_layers(self)

    @abstractmethod
    def alone(self, network: Any, sample: Tensor, timestep: Tensor) -> Tensor:
        """What a network of the same config predicts by itself, (B, C, H, W)."""

    def examples(self, device: torch.device) -> tuple[Tensor, Tensor, Observation]:
        """Random inputs of `forward`."""
        generator = torch.Generator().manual_seed(0)
        channels, flags = self.inputs
        size = [self.space, (channels, *self.space[1:]), (flags,)]
        sample, channels_seen, flags_set = (torch.randn(2, *shape, generator=generator).to(device) for shape in size)
        return sample, torch.tensor([1, 10], device=device), Observation(channels_seen, flags_set)


def complete_config(cls: type[ModelMixin], config: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of a network's class in JSON's types: what is needed to build it, and nothing else.

    Args:
        cls: of diffusers.
        config: as `config.json` has it.

    Raises:
        InputError: for a setting that the class does not have, such as a quantization, and for huge numbers.
    """
    if not isinstance(config, Mapping) or not all(isinstance(name, str) for name in config):
        raise InputError(KEY, config, f"needs the config of a {cls.__name__}")
    defaults = {n: p.default for n, p in inspect.signature(cls.__init__).parameters.items() if n != "self"}
    for name, value in config.items():
        if name not in defaults and not name.startswith("_") and value not in _OFF:
            raise InputError(f"{KEY}.{name}", value, f"{cls.__name__} has no such setting")
    complete = {name: _plain(config.get(name, default)) for name, default in defaults.items()}
    refuse_huge(complete, KEY)
    return complete


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def build_network(cls: type[ModelMixin], config: Any) -> Any:
    """The network of a config, with random weights.

    Raises:
        InputError: it cannot be built.
    """
    complete = complete_config(cls, config)
    try:
        return cls(**complete)
    except _ERRORS as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(KEY, cls.__name__, f"cannot be built: {said}") from None


def check_channels(config: Mapping[str, Any], channels: int) -> None:
    """The network must work on the diffusion space. Outputs beyond it are a learned variance, which is left out.

    Args:
        config: of the network, complete.
        channels: of the diffusion space.

    Raises:
        InputError: naming the setting.
    """
    inputs, outputs = config["in_channels"], config["out_channels"]
    if inputs != channels:
        raise InputError(f"{KEY}.in_channels", inputs, f"the diffusion space has {channels} channels")
    outputs = inputs if outputs is None else outputs
    if outputs not in (channels, 2 * channels):
        remedy = f"the diffusion space has {channels} channels, with a learned variance {2 * channels}"
        raise InputError(f"{KEY}.out_channels", outputs, remedy)


def flag_layers(num_flags: int, width: int) -> nn.Sequential:
    """(B, num_flags) -> (B, width), zeros at the start and for zeros."""
    layers = nn.Sequential(nn.Linear(num_flags, width, bias=False), nn.SiLU(), nn.Linear(width, width, bias=False))
    nn.init.zeros_(layers[2].weight)
    return layers


def zero_conv(channels: int, width: int, kernel: int, stride: int = 1) -> nn.Conv2d | None:
    """The rest of a widened input convolution, which starts at zero; None where nothing is observed."""
    if channels == 0:
        return None
    conv = nn.Conv2d(channels, width, kernel, stride, padding=0 if stride > 1 else kernel // 2, bias=False)
    nn.init.zeros_(conv.weight)
    return conv
