"""Metrics: always `metrics.jsonl`, W&B if asked."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdiff.config import Config
from mmdiff.errors import InputError
from mmdiff.training.disk import whole


class Tracker:
    """Lines of metrics in a run folder.

    Args:
        folder: the run folder.
        config: its `track` decides whether W&B gets the lines too (WANDB_MODE=offline works).
        first_step: lines after this step are cut: they will be written again.
    """

    def __init__(self, folder: Path, config: Config, first_step: int) -> None:
        self.path = folder / "metrics.jsonl"
        self._cut(first_step)
        self._wandb = None
        if "wandb" in config.trackers():
            import wandb

            try:
                self._wandb = wandb.init(
                    project="mmdiff", name=config.name, dir=str(folder), config=config.model_dump(mode="json")
                )
            except wandb.Error as error:
                remedy = f"W&B cannot be used: {error}; or set WANDB_MODE=offline"
                raise InputError("track", "wandb", remedy, everywhere=False) from None

    def _cut(self, step: int) -> None:
        """Keep the lines up to a step; half a line, or one that was damaged, goes."""
        if self.path.exists():
            lines = self.path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if _is_metrics(line, step)]
            with whole(self.path) as partial:
                partial.write_text("".join(f"{line}\n" for line in kept))

    def log(self, line: dict[str, Any]) -> None:
        """Append one line, or nothing of it."""
        encoded = json.dumps(line).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(encoded) < len(encoded):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(before)
                raise
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def image(self, name: str, path: Path, step: int) -> None:
        """Show a picture in W&B."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """End the W&B run."""
        if self._wandb is not None:
            self._wandb.finish()


def _is_metrics(line: str, last: int) -> bool:
    """Whether a line holds the metrics of a step up to the last."""
    try:
        read = json.loads(line)
        return read["step"] <= last and all(isinstance(value, int | float) for value in read.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


class Window:
    """Terms of the steps since the last line, on the device until they are read: no synchronisation in between.

    Args:
        rows: from a checkpoint, (n, terms), already averaged over processes.
    """

    def __init__(self, rows: Tensor | None = None) -> None:
        self.names: tuple[str, ...] = ()
        self.averaged: list[Tensor] = [] if rows is None else list(rows)
        self.local: list[Tensor] = []

    def add(self, terms: dict[str, Tensor]) -> None:
        """One step's terms of this process."""
        self.names = tuple(sorted(terms))
        self.local.append(torch.stack([terms[name].detach().float() for name in self.names]))

    def rows(self, accelerator: Any) -> Tensor:
        """(n, terms) averaged over processes, on the CPU; every process must call it."""
        if self.local:
            rows = accelerator.reduce(torch.stack(self.local), reduction="mean")
            self.averaged += list(rows.cpu())
            self.local = []
        return torch.stack(self.averaged) if self.averaged else torch.zeros(0, len(self.names))

    def clear(self) -> None:
        """Begin anew after a line."""
        self.averaged, self.local = [], []
