"""Metrics: always `metrics.jsonl`, and where `track` sends them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdiff.config import Config
from mmdiff.training.disk import whole
from mmdiff.training.trackers import Sinks

MACHINE = ("images_per_second", "mfu", "memory_gib")  # entries of a line that measure the machine, not the run


class Tracker:
    """Lines of metrics in a run folder.

    Args:
        folder: the run folder.
        config: its `track` names where else the lines go.
        first_step: lines after this step are cut: they will be written again.
    """

    def __init__(self, folder: Path, config: Config, first_step: int) -> None:
        self.path = folder / "metrics.jsonl"
        self._cut(first_step)
        self._sinks = Sinks(folder, config, first_step)

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
        self._sinks.call("log", {key: value for key, value in line.items() if key != "step"}, line["step"])

    def image(self, name: str, path: Path, step: int) -> None:
        """Show a picture where `track` sends it."""
        self._sinks.call("image", name, path, step)

    def close(self) -> None:
        """End the tracking."""
        self._sinks.call("close")


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
