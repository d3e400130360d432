"""The one line that a person sees of a run: in place on a terminal, now and then in a log file."""

from __future__ import annotations

import datetime
import os
import sys
import time
from typing import Any

from tqdm.auto import tqdm

WIDTH = 100  # columns
PAUSE = 5.0  # seconds between lines of a log file


class Console:
    """Step, loss, learning rate, images per second, MFU and the time that is left, on stderr.

    Args:
        steps: of the run.
        first_step: steps taken before.
        shown: whether anything is.
    """

    def __init__(self, steps: int, first_step: int, shown: bool) -> None:
        self.steps, self.first_step, self.shown = steps, first_step, shown
        self.started, self._said = time.monotonic(), -PAUSE
        live = shown and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        form = "step {n_fmt}/{total_fmt}{postfix}, eta {remaining}"
        self._bar = tqdm(total=steps, initial=first_step, disable=not live, bar_format=form, mininterval=0.5)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.shown:
            tqdm.write(text, file=sys.stderr)

    def step(self) -> None:
        """One more step."""
        self._bar.update()

    def line(self, line: dict[str, Any]) -> None:
        """What a line of metrics says."""
        if not self.shown:
            return
        done, final = line["step"], line["step"] == self.steps
        if not self._bar.disable:
            columns = min(WIDTH, _columns())
            self._bar.set_postfix_str(fitting(entries(line), columns - 2 * len(str(self.steps)) - 24), refresh=False)
        elif final or time.monotonic() - self._said >= PAUSE:
            self._said = time.monotonic()
            left = (self._said - self.started) / (done - self.first_step) * (self.steps - done)
            ends = f"step {done}/{self.steps}", f"eta {datetime.timedelta(seconds=round(left))}"
            room = WIDTH - sum(map(len, ends)) - 4
            print(f"{ends[0]}, {fitting(entries(line), room)}, {ends[1]}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the last line where it is."""
        self._bar.close()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _columns() -> int:
    """Of the terminal; a notebook has no such number."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or WIDTH
    except (OSError, ValueError):
        return WIDTH


def entries(line: dict[str, Any]) -> list[str]:
    """Loss, learning rate, images per second and MFU, the most important first."""
    return [
        f"loss {line['loss']:.4g}",
        f"{line['images_per_second']:.4g} images/s",
        f"lr {line['learning_rate']:.2e}",
        f"MFU {line['mfu']:.1%}",
    ]


def fitting(parts: list[str], columns: int) -> str:
    """As many parts as fit."""
    text = parts[0]
    for part in parts[1:]:
        if len(text) + 2 + len(part) <= columns:
            text += f", {part}"
    return text
