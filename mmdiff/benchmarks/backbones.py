"""What the transformer costs: against diffusers' DiT, in bfloat16, with checkpointing, with dropped tokens."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from mmdiff.backbones import DiT, Observation
from mmdiff.benchmarks.interleaved import interleaved, ratio
from mmdiff.benchmarks.machine import machine
from mmdiff.errors import InputError
from mmdiff.evaluation.tables import facts, table
from mmdiff.training.process import set_threads

HEAD = ("comparison", "ratio (rounds)", "bar", "reached", "remark")
CLASSES = 10  # of the label that both networks are given


@dataclass(frozen=True)
class Request:
    """Sizes of the networks and of the batch.

    Attributes:
        rounds: of which medians are taken.
        batch, channels, side: shape of the latents.
        patch, width, depth, heads: of both networks.
        deep: depth where checkpointing and dropping are timed.
        threads: on a CPU.
        device: cpu or cuda.
        out: a JSON file, or None.
    """

    rounds: int = 9
    batch: int = 4
    channels: int = 4
    side: int = 32
    patch: int = 2
    width: int = 384
    depth: int = 4
    heads: int = 6
    deep: int = 12
    threads: int = 1
    device: str = "cpu"
    out: Path | None = None

    @property
    def space(self) -> tuple[int, int, int]:
        """Of the diffusion."""
        return self.channels, self.side, self.side


@dataclass(frozen=True)
class Row:
    """One comparison: ``value`` (lowest, highest of the rounds) is to reach ``bar``, from above or from below."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    bar: str
    met: bool | None
    remark: str


def run(request: Request) -> str:
    """All comparisons as a table, and as JSON where a file is named.

    Every time is that of a forward and a backward pass; the two sides take turns.

    Raises:
        InputError: the device is not there.
    """
    if request.device != "cpu" and not torch.cuda.is_available():
        raise InputError("--device", request.device, "no such device; leave it out")
    set_threads(request.threads)
    about = machine(request.device)
    rows = [*_precisions(request), *_checkpointing(request), _dropping(request)]
    about["load at the end"] = machine(request.device)["load"]
    sizes = {name: value for name, value in asdict(request).items() if name not in ("out", "device", "threads")}
    if request.out is not None:
        tree = {**about, "sizes": sizes, "rows": [asdict(row) for row in rows]}
        request.out.parent.mkdir(parents=True, exist_ok=True)
        request.out.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    return "\n".join([*facts(about | {"sizes": sizes}), "", *table(HEAD, list(map(_cells, rows)))])


def _cells(row: Row) -> list[str]:
    figure = "not measured" if row.value is None else f"{row.value:.3f} ({row.low:.3f} … {row.high:.3f})"
    return [row.name, figure, row.bar, {True: "yes", False: "no", None: ""}[row.met], row.remark]


def step_of(request: Request, network: nn.Module, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    """A forward and a backward pass of our network or of diffusers', with the same latents, times and labels."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(request.batch, *request.space, generator=generator).to(request.device)
    timestep = (torch.arange(request.batch) * 1000 // request.batch).to(request.device)
    label = (torch.arange(request.batch) % CLASSES).to(request.device)
    ours = isinstance(network, DiT)
    if ours:
        count = network.random_numbers(request.side, request.side)
        numbers = torch.rand(request.batch, count, generator=generator).to(request.device) if count else None
        flags = torch.nn.functional.one_hot(label + 2, 2 + CLASSES).float()
        observation = Observation(sample.new_zeros(request.batch, 0, request.side, request.side), flags, numbers)

    def predict() -> Tensor:
        if ours:
            return network(sample, timestep, observation).prediction
        return network(sample, timestep, label, return_dict=False)[0]

    def step() -> None:
        with torch.autocast(request.device, dtype, enabled=dtype != torch.float32):
            loss = predict().float().square().mean()
        loss.backward()
        network.zero_grad(set_to_none=True)

    return step


def our_dit(request: Request, depth: int, **settings: Any) -> DiT:
    """With one label; its last layer is no longer zero, so that gradients flow as in training."""
    torch.manual_seed(0)
    sizes = {"depth": depth, "width": request.width, "heads": request.heads, "patch_size": request.patch}
    network = DiT(request.space, 0, (2 + CLASSES,), **sizes, **settings)
    nn.init.normal_(network.out.weight, std=0.02)
    return network.to(request.device)


def diffusers_dit(request: Request) -> DiTTransformer2DModel:
    """Of the same width, depth, heads and patches."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=request.heads,
        attention_head_dim=request.width // request.heads,
        in_channels=request.channels,
        num_layers=request.depth,
        sample_size=request.side,
        patch_size=request.patch,
        num_embeds_ada_norm=CLASSES,
    ).to(request.device)


def _precisions(request: Request) -> list[Row]:
    ours, theirs = our_dit(request, request.depth), diffusers_dit(request)
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    sides = {
        f"{side} {name}": step_of(request, network, dtype)
        for name, dtype in names.items()
        for side, network in (("mmdiff", ours), ("diffusers", theirs))
    }
    times = interleaved(sides, request.rounds, request.device)
    rows = [
        _row(f"speed over diffusers' DiT, {name}", times, f"diffusers {name}", f"mmdiff {name}", 1.0) for name in names
    ]
    return [*rows, _row("speed in bfloat16 over float32", times, "mmdiff float32", "mmdiff bfloat16", 1.7)]


def _checkpointing(request: Request) -> list[Row]:
    networks = {on: our_dit(request, request.deep, gradient_checkpointing=on) for on in (False, True)}
    sides = {f"checkpointing {on}": step_of(request, network) for on, network in networks.items()}
    times = interleaved(sides, request.rounds, request.device)
    slower = _row("time with checkpointing", times, "checkpointing True", "checkpointing False", 1.35, at_most=True)
    del networks, sides
    peaks = [_peak(request, checkpointing) for checkpointing in (False, True)]
    name = "peak memory of a step with checkpointing"
    if None in peaks:
        return [slower, Row(name, None, None, None, "<= 0.6", None, "this system does not tell")]
    share, (whole, cut) = peaks[1] / peaks[0], (peak / 2**20 for peak in peaks)
    remark = f"{cut:.0f} against {whole:.0f} MiB above the weights, gradients included"
    return [slower, Row(name, share, share, share, "<= 0.6", share <= 0.6, remark)]


def _dropping(request: Request) -> Row:
    outer = max(1, request.deep // 6)  # a third of the blocks see all patches
    sides = {
        f"token_drop {share}": step_of(request, our_dit(request, request.deep, token_drop=share, outer_blocks=outer))
        for share in (0.0, 0.75)
    }
    times = interleaved(sides, request.rounds, request.device)
    return _row("steps per second with token_drop 0.75", times, "token_drop 0.0", "token_drop 0.75", 1.6)


def _row(name: str, times: Mapping[str, list[float]], one: str, other: str, bar: float, at_most: bool = False) -> Row:
    """The ratio of the seconds of two sides."""
    middle, low, high = ratio(times, one, other)
    medians = [1000 * statistics.median(times[side]) for side in (one, other)]
    remark = f"{one} {medians[0]:.1f} ms, {other} {medians[1]:.1f} ms"
    met = middle <= bar if at_most else middle >= bar
    return Row(name, middle, low, high, f"{'<=' if at_most else '>='} {bar}", met, remark)


def _peak(request: Request, checkpointing: bool) -> int | None:
    """Bytes that one step takes at its worst, beyond what lay there before; on a CPU in a process of its own."""
    if request.device != "cpu":
        step = step_of(request, our_dit(request, request.deep, gradient_checkpointing=checkpointing))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    # glibc gives freed memory back at once, so that what was freed is not counted
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident_peak, (request, checkpointing))


def _resident_peak(request: Request, checkpointing: bool) -> int:
    """Growth of this process's largest resident set over one step."""
    torch.set_num_threads(request.threads)
    small = Request(batch=1, side=2 * request.patch, width=request.width, heads=request.heads, patch=request.patch)
    step_of(small, our_dit(small, 1))()  # what libraries keep from their first call is no part of a step
    step = step_of(request, our_dit(request, request.deep, gradient_checkpointing=checkpointing))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the largest set is counted from now on
    step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
