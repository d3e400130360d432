"""The contract of a backbone (docs/theory.md, section 4: the three states of a modality)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmdiff.slots import Axes, Slot


class Observation(NamedTuple):
    """The backbone's second input.

    ``channels`` (B, O, H, W): E_i(x_i) of observed modalities, zeros for others. ``flags`` (B, V): for every modality,
    in the order of the names, whether it is aggregated, whether it is observed, and its context: numbers of an observed
    value without a place in space, zeros for others. ``random`` (B, R): uniform numbers of [0, 1) that training draws
    for what the backbone does at random, see `Backbone.random_numbers`; None in sampling.
    """

    channels: Tensor
    flags: Tensor
    random: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Observation:
        """Channels and flags in a dtype."""
        return self._replace(channels=self.channels.to(dtype), flags=self.flags.to(dtype))


class BackboneOutput(NamedTuple):
    """``prediction`` (B, C, H, W) by the scheduler's `prediction_type`; ``features`` (B, F, H / s, W / s) and
    ``pooled`` (B, P), the inputs of the decoder heads."""

    prediction: Tensor
    features: Tensor
    pooled: Tensor


class Widths(NamedTuple):
    """Sizes of the heads' inputs: F channels of ``features`` at stride s, P numbers of ``pooled``."""

    features: int
    pooled: int
    stride: int


class Backbone(nn.Module, ABC):
    """A denoising network.

    Args:
        space: (C, H, W) of the diffusion space.
        observation_channels: O.
        flag_widths: how many of the V flags belong to each modality.
    """

    stands_for: ClassVar[tuple[str, ...]] = ()  # kinds that a config may name where `initialize_from` gives this one
    #: Begins the names of parameters through which modalities enter and are read: LoRA trains them whole.
    modality_parts: tuple[str, ...] = ()
    training_only: ClassVar[frozenset[str]] = frozenset({"dropout", "gradient_checkpointing"})  # change no prediction
    #: Height and width of the diffusion space are multiples of it.
    multiple: int = 1

    def __init__(self, space: tuple[int, int, int], observation_channels: int, flag_widths: Sequence[int]) -> None:
        super().__init__()

    @classmethod
    @abstractmethod
    def widths(cls, **settings: Any) -> Widths:
        """The sizes of ``features`` and ``pooled`` under these settings."""

    def slots(self, channels: Sequence[Slot], flags: Sequence[Slot]) -> dict[str, Axes]:
        """Slots of the tensors whose inputs depend on the modalities, for fine-tuning: {name in the state dict: axes}.

        Tensors that are not named are copied whole.

        Args:
            channels: of the O observation channels.
            flags: of the V numbers of `Observation.flags`.
        """
        return {}

    def blocks(self) -> Sequence[nn.Module]:
        """Parts that are called one after the other, each as a module: training may compile them or share them out."""
        return ()

    def matrices(self) -> Sequence[nn.Parameter]:
        """The weights that Muon trains: matrices and kernels, not tables."""
        return [parameter for parameter in self.parameters() if parameter.ndim > 1]

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile each of the `blocks` in place, as one graph without breaks; equal blocks share their code."""
        for block in self.blocks():
            block.compile(fullgraph=True, backend=backend)

    def random_numbers(self, height: int, width: int) -> int:
        """R, uniform numbers per sample that a training step hands over, for a diffusion space of this size.

        They are functions of (seed, step, position), so that several processes and accumulation draw the same.
        """
        return 0

    def attention_layers(self) -> list[str]:
        """Names of the linear layers of attention, which LoRA adapts by default."""
        return []

    def map_of(self, output: Any, height: int, width: int) -> Tensor:
        """The map (B, D, h, w) in what one of the `blocks` gives, for a diffusion space of this size."""
        return output[0] if isinstance(output, tuple) else output

    @abstractmethod
    def forward(self, sample: Tensor, timestep: Tensor, observation: Observation) -> BackboneOutput:
        """sample (B, C, H, W), timestep (B,) in 0 … T − 1; H and W may be other multiples than those of `space`."""
