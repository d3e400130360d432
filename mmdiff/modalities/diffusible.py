"""Modalities that can be diffused: the head's mean is what a solver of the modality's own process needs, Eq. (25)."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from mmdiff.modalities.base import Modality


class Diffusible(Modality):
    """A modality with a *signal* S_i(x_i): what the backbone sees of an observed value, as one tensor.

    The signal is linear in the sufficient statistics of the head's law (one-hot of a categorical, the value of a
    Gaussian), so that the head that minimises `nll` also has the right mean of the signal.
    """

    #: Whether the head draws pixels one by one.
    pixelwise: ClassVar[bool] = False

    def check_diffused(self) -> None:  # noqa: B027 (by default nothing is in the way)
        """Refuse settings whose head has another mean.

        Raises:
            InputError: naming the setting.
        """

    @property
    def signal_shape(self) -> tuple[int, ...]:
        """Without batch: (channels, H, W) of `observe`, or (width,) of `context` where it has no channels."""
        channels = self.observation_channels
        return (channels, *self.shape.space[1:]) if channels else (self.context_width,)

    def signal(self, value: Tensor) -> Tensor:
        """S_i(x_i), (B, *signal_shape)."""
        return self.observe(value) if self.observation_channels else self.context(value)

    @abstractmethod
    def expected_signal(self, params: Tensor) -> Tensor:
        """E[S_i(x_i)] under the head's law, (B, *signal_shape)."""

    def settled(self, params: Tensor, noise: Tensor) -> Tensor:
        """The value at the end of the modality's own process: a draw, which keeps the noise that belongs to the value.

        Maps take the mode: pixels that are drawn one by one disagree. Arguments as of `sample`.
        """
        return self.mode(params) if self.pixelwise else self.sample(params, noise)
