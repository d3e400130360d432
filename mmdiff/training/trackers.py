"""Where lines of metrics are sent beside `metrics.jsonl`: W&B and TensorBoard. One class each, one line in a dict."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmdiff.config import Config
from mmdiff.errors import InputError, printable


class Sink(ABC):
    """Takes numbers and pictures.

    Args:
        folder: the run folder, in which it writes.
        config: of the run.
        first_step: steps taken before; what was sent of later ones is sent again.

    Raises:
        InputError: it cannot be used as it is set up.
    """

    @abstractmethod
    def __init__(self, folder: Path, config: Config, first_step: int) -> None: ...

    @abstractmethod
    def log(self, numbers: dict[str, float], step: int) -> None:
        """Numbers by name, after a step."""

    @abstractmethod
    def image(self, name: str, path: Path, step: int) -> None:
        """A picture in a file."""

    @abstractmethod
    def close(self) -> None:
        """Send what is left."""


class Wandb(Sink):
    """Weights & Biases; WANDB_MODE=offline keeps all in the run folder."""

    def __init__(self, folder: Path, config: Config, first_step: int) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project="mmdiff", name=config.name, dir=str(folder), config=config.model_dump(mode="json")
            )
        except wandb.Error as error:
            remedy = f"W&B cannot be used: {error}; or set WANDB_MODE=offline"
            raise InputError("track", "wandb", remedy, everywhere=False) from None

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def image(self, name: str, path: Path, step: int) -> None:
        import wandb

        self._run.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard(Sink):
    """Event files in `tensorboard/` of the run folder."""

    def __init__(self, folder: Path, config: Config, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            remedy = "TensorBoard is not installed: pip install 'mmdiff[tensorboard]'"
            raise InputError("track", "tensorboard", remedy, everywhere=False) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def image(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


SINKS: dict[str, type[Sink]] = {"tensorboard": TensorBoard, "wandb": Wandb}


class Sinks:
    """All that a config asks for. One that fails is left out with one line; it never ends a training.

    Args:
        folder, config, first_step: see `Sink`.
    """

    def __init__(self, folder: Path, config: Config, first_step: int) -> None:
        self._sinks = {name: SINKS[name](folder, config, first_step) for name in config.trackers()}

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method of each."""
        for name, sink in list(self._sinks.items()):
            try:
                getattr(sink, method)(*arguments)
            except Exception as error:  # networks, disks and services fail in many ways
                del self._sinks[name]
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                print(
                    printable(f"warning: track: {name} failed and gets nothing more ({reason}); metrics.jsonl goes on"),
                    file=sys.stderr,
                )
