"""What only the anchor needs, and what only modalities that fill it need."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmdiff.errors import InputError
from mmdiff.modalities.base import Modality


class KnownPart(NamedTuple):
    """What of z_0 is known: ``encoding`` (B, C, H, W), right where ``mask`` (B, 1, H, W) bool is true."""

    encoding: Tensor
    mask: Tensor


class Anchor(Modality):
    """A modality that can be diffused: its encoder fixes the diffusion space."""

    @staticmethod
    @abstractmethod
    def diffusion_space(**settings: Any) -> tuple[int, int, int]:
        """The diffusion space (C, H, W) that an anchor of these settings opens."""

    @staticmethod
    def bounded(**settings: Any) -> bool:
        """Whether the encodings lie in [−1, 1], so that sampling may clip the predicted z_0."""
        return False

    @property
    def frozen(self) -> nn.Module | None:
        """A network that the anchor uses and never trains (an autoencoder); pipelines save it as a part of theirs."""
        return None

    def frozen_encoding(self, value: Tensor) -> Tensor | None:
        """What the frozen network makes of values, before anything is drawn of it: (B, K, h, w).

        `mmdiff encode` writes it once, and `prepare` takes it. None: there is no such network.
        """
        return None

    def blank(self, count: int, device: torch.device) -> Tensor:
        """The `frozen_encoding` of a missing value, (1, K, h, w), in a batch of ``count``, on which bits may depend."""
        raise InputError("anchor", type(self).__name__, "has no frozen network")

    def prepare(  # noqa: B027 (by default there is nothing to prepare)
        self, value: Tensor, noise: Callable[[tuple[int, ...]], Tensor], stored: Tensor | None = None
    ) -> None:
        """Before a training step encodes these values: draw what E draws.

        Args:
            value: the batch's, of which `encode` and `observe` are asked next.
            noise: shape -> standard normal numbers (B, *shape), a function of the step and the samples' positions.
            stored: their `frozen_encoding` where it was written before; the value may then lack its channels.
        """

    @abstractmethod
    def unencode(self, encoding: Tensor) -> Tensor:
        """z_0 (B, C, H, W) -> the value x_0 whose encoding it is."""


class FillsAnchor(Modality):
    """A modality that is a part of the anchor: its head predicts the whole anchor.

    It lives in the anchor's own subspace: it is observed or absent, never aggregated. Its L2 term counts where it is
    observed, too.
    """

    aggregable: ClassVar[bool] = False

    @abstractmethod
    def check_anchor(self, anchor: Anchor) -> None:
        """Refuse an anchor that this modality does not go with."""

    @abstractmethod
    def target(self, value: Tensor, anchor: Tensor) -> Tensor:
        """What `nll` is asked about: the anchor's value as one of the modality."""

    @abstractmethod
    def anchor_mode(self, params: Tensor) -> Tensor:
        """The likeliest value of the anchor."""

    @abstractmethod
    def known_part(self, value: Tensor, anchor: Anchor) -> KnownPart:
        """What an observed value fixes of z_0."""

    @abstractmethod
    def paste(self, anchor: Tensor, value: Tensor) -> Tensor:
        """The anchor's value with what an observed value fixes of it, bit-exactly."""
