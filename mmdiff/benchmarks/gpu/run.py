"""One command that fills every row that needs an accelerator: parts in order of worth, each within its time.

What is measured is written as it comes. A part that fails, or for which no time is left, is a line; the others go on.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmdiff.benchmarks.gpu import measures
from mmdiff.benchmarks.gpu.cases import REAL, TOY, Size
from mmdiff.benchmarks.machine import machine
from mmdiff.errors import InputError
from mmdiff.evaluation.tables import facts, table
from mmdiff.training.flops import matrix_peak

HEAD = ("network", "precision", "compiled", "batch", "images/s", "MFU", "GFLOP per image", "peak GiB", "warm-up s")


@dataclass(frozen=True)
class Request:
    """What is measured.

    Attributes:
        out: folder of results.
        budget: minutes in all.
        toy: a toy size, which a CPU computes too.
    """

    out: Path = Path("runs/gpu")
    budget: float = 9.0
    toy: bool = False


class Part(BaseException):
    """The time of a part is over; no `except Exception` of a compiler takes it."""


@dataclass(frozen=True)
class Step:
    """A part: its name, the most seconds that it may take, and what it does."""

    name: str
    seconds: float
    measure: Callable[[], dict[str, Any]]


def run(request: Request, say: Callable[[str], object] = lambda text: None) -> str:
    """Measure, and write OUT/gpu.json and OUT/gpu.txt; returns the table.

    Args:
        request: what is measured.
        say: is told each part when it is done.

    Raises:
        InputError: there is no accelerator and the size is no toy, or the folder holds results.
    """
    if not (request.toy or torch.cuda.is_available()):
        raise InputError("device", "cpu", "torch finds no accelerator here; --toy measures a toy size on the CPU")
    if not 0.1 <= request.budget <= 24 * 60:
        raise InputError("--budget", request.budget, "needs minutes, 0.1 at least")
    if (request.out / "gpu.json").exists():
        raise InputError("--out", str(request.out), "holds results already; choose another folder")
    request.out.mkdir(parents=True, exist_ok=True)
    size, started = TOY if request.toy else REAL, time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {"machine": machine(device), "size": "toy" if request.toy else "real"}
    results |= {"budget_minutes": request.budget, "parts": {}}
    for part in _parts(size, request.out, device, results["parts"]):
        left = 60 * request.budget - (time.monotonic() - started)
        results["parts"][part.name] = _measured(part, left)
        results["seconds"] = time.monotonic() - started
        _write(request.out, results)
        say(f"{part.name}: {_short(results['parts'][part.name])}")
        measures.clean()
    return _text(results)


def _parts(size: Size, out: Path, device: str, done: dict[str, Any]) -> list[Step]:
    """In order of worth: what is measured last falls away first."""

    def peaks() -> dict[str, float]:
        return {p: f["flops"] for p in measures.PRECISIONS if "flops" in (f := done.get(f"matrix peak {p}", {}))}

    def step_of(name: str, precision: str, compiled: bool, seconds: float) -> Step:
        title = f"{name} {precision}{' compiled' if compiled else ''}"
        return Step(title, seconds, lambda: measures.throughput(size, name, precision, compiled, peaks()))

    names, first = list(size.networks), next(iter(size.networks))
    return [
        *(Step(f"matrix peak {p}", 30, partial(_peak, device, p)) for p in measures.PRECISIONS),
        Step("no waiting for the accelerator", 60, partial(measures.waiting, size, first)),
        *(step_of(name, "bf16", False, 60) for name in names),
        step_of(size.compiled[0], "bf16", True, 120),
        Step("latency of a sampling step", 60, partial(measures.latency, size, names[-1])),
        Step("bf16 against fp32", 60, partial(measures.losses, size, first)),
        Step("training on shapes", 120, partial(measures.real_training, size, out)),
        Step("killed and resumed", 120, partial(measures.resume, size, out)),
        *(step_of(name, precision, False, 60) for precision in ("tf32", "fp32") for name in names),
        *(step_of(name, "bf16", True, 200) for name in size.compiled[1:]),
        *(step_of(name, precision, True, 200) for precision in ("tf32", "fp32") for name in size.compiled),
    ]


def _peak(device: str, precision: str) -> dict[str, float]:
    measures.set_precision(precision)
    return {"flops": matrix_peak(device, torch.bfloat16 if precision == "bf16" else torch.float32)}


def _measured(part: Step, left: float) -> dict[str, Any]:
    if left < 5:
        return {"not_measured": "no time was left"}
    try:
        with _within(min(part.seconds, left)):
            return part.measure()
    except Part:
        return {"not_measured": f"took longer than {min(part.seconds, left):.0f} s"}
    except Exception as error:  # whatever one part meets, the others are measured
        return {"not_measured": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise `Part` when the time is over. In the main thread only, as signals are."""

    def over(number: int, frame: object) -> None:
        raise Part

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _write(out: Path, results: dict[str, Any]) -> None:
    """What is there so far."""
    for name, text in (("gpu.json", json.dumps(results, indent=1)), ("gpu.txt", _text(results))):
        partial_file = out / f"{name}.partial"
        partial_file.write_text(text + "\n")
        partial_file.replace(out / name)


def _text(results: dict[str, Any]) -> str:
    """The machine, a row per network, precision and compilation, and a line per further part."""
    rows, lines = [], []
    for name, found in results["parts"].items():
        if "images_per_second" in found and "batch" in found:
            network, precision, *compiled = name.rsplit(" ", 2) if name.endswith("compiled") else name.rsplit(" ", 1)
            rows.append([network, precision, "yes" if compiled else "no", *_cells(found)])
        else:
            lines.append(f"{name}: {_short(found)}")
    return "\n".join([*facts(results["machine"]), "", *table(HEAD, rows), "", *lines])


def _cells(found: dict[str, Any]) -> list[str]:
    mfu, memory = found["mfu"], found["peak_gib"]
    return [
        str(found["batch"]),
        f"{found['images_per_second']:.1f}",
        "" if mfu is None else f"{100 * mfu:.1f} %",
        f"{found['gflops_per_image']:.3g}",
        "not measured" if memory is None else f"{memory:.1f}",
        f"{found['warm_up_seconds']:.1f}",
    ]


def _short(found: dict[str, Any]) -> str:
    if "not_measured" in found:
        return f"not measured: {found['not_measured']}"
    plain = {key: value for key, value in found.items() if not isinstance(value, list)}
    texts = (f"{value:.4g}" if isinstance(value, float) else value for value in plain.values())
    return ", ".join(f"{key} {text}" for key, text in zip(plain, texts, strict=True))
