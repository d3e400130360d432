"""A training step against other loops, a sampling step against the bare solver: CPU time, the sides take turns."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff.benchmarks.interleaved import interleaved
from mmdiff.benchmarks.machine import machine
from mmdiff.benchmarks.speed.sampling import sampling
from mmdiff.benchmarks.speed.sides import TRAINING
from mmdiff.config import Config
from mmdiff.errors import InputError
from mmdiff.evaluation.tables import facts, table
from mmdiff.training.process import set_threads
from mmdiff.trust import refuse_custom

SIDES = (*TRAINING, "solver")
OF_CONFIGS = ("bare", "anchor", "solver")  # the others have an experiment of their own
#: What has to be reached: {side or (side, experiment): largest ratio of the CPU times}.
BARS = {"bare": 1.08, ("bare", "digits"): 1.03, "anchor": 1.05, "diffusers": 0.97, "muon": 1.08}
MOST_IMAGES = 1.4  # least ratio of the images per second at equal FLOPs, against ddpm
OVERHEADS = {"joint": 250, "given the rest": 120}  # microseconds of a sampling step
HEAD = ("experiment", "against", "mmdiff", "other", "ratio (rounds)", "bar", "reached")


@dataclass(frozen=True)
class Request:
    """What is timed.

    Attributes:
        configs: of the experiments. "diffusers", "muon" and "ddpm" have their own, of which only the threads are the
            first's.
        rounds, steps: rounds of that many steps of each side.
        against: one of `SIDES`, or "all": every bar.
        trust: whether a config may name code and contact the hub.
        out: folder of speed.json and speed.txt; None: nothing is written.
    """

    configs: tuple[Config, ...]
    rounds: int = 9
    steps: int = 10
    against: str = "bare"
    trust: bool = False
    out: Path | None = None


def run(request: Request) -> str:
    """The table of the sides' times and ratios, with the machine.

    Raises:
        InputError: a config names code that is not trusted, or the other side is unknown or not installed.
    """
    if request.against not in (*SIDES, "all"):
        raise InputError("--against", request.against, f"choose {', '.join(SIDES)} or all")
    if not request.trust:
        for config in request.configs:
            refuse_custom(config.model_dump()["modalities"])
    set_threads(request.configs[0].train.threads)
    results: dict[str, Any] = {"machine": machine(), "rounds": request.rounds, "steps": request.steps, "rows": []}
    for rows in _measured(request):
        results["rows"] += rows
        text = _text(results)
        if request.out:
            request.out.mkdir(parents=True, exist_ok=True)
            (request.out / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
            (request.out / "speed.txt").write_text(text + "\n")
    return text


def _measured(request: Request) -> Iterator[list[dict[str, Any]]]:
    """Rows, as they come."""
    for side in SIDES if request.against == "all" else (request.against,):
        configs = request.configs if side in OF_CONFIGS else request.configs[:1]
        for config in configs:
            if request.against == "all" and side == "bare":
                config = _updated(config, optimizer="adamw")
            try:
                yield _sampling(config, request) if side == "solver" else [_training(config, side, request)]
            except InputError as error:
                if request.against != "all":
                    raise
                yield [{"experiment": config.name, "against": side, "not_measured": str(error)}]


def _updated(config: Config, **train: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def _training(config: Config, side: str, request: Request) -> dict[str, Any]:
    """Milliseconds of CPU time per step of both sides, and their ratio."""
    config = _updated(config, steps=(request.rounds + 2) * request.steps)
    pair = TRAINING[side](config, request.trust)
    sides = {"mmdiff": _repeated(pair.mmdiff, request.steps), "other": _repeated(pair.other, request.steps)}
    times = interleaved(sides, request.rounds)
    ours, others = ([1000 * seconds / request.steps for seconds in times[name]] for name in sides)
    ratios = [a / b for a, b in zip(ours, others, strict=True)]
    name = config.name if side in OF_CONFIGS else "image + label, 6.5 M"
    row = {"experiment": name, "against": side, "mmdiff_ms": statistics.median(ours)}
    row |= {"other_ms": statistics.median(others)}
    if side == "ddpm":
        ratios = [pair.work / ratio for ratio in ratios]  # images per second at equal FLOPs
        row |= {"bar": f">= {MOST_IMAGES}", "reached": statistics.median(ratios) >= MOST_IMAGES}
    else:
        bar = BARS.get((side, config.name), BARS[side])
        row |= {"bar": f"<= {bar}", "reached": statistics.median(ratios) <= bar}
    return row | {"ratio": statistics.median(ratios), "rounds": ratios, "load": machine()["load"]}


def _repeated(step: Callable[[], None], count: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(count):
            step()

    return steps


def _sampling(config: Config, request: Request) -> list[dict[str, Any]]:
    rows = []
    for title, seconds_of in sampling(config, request.rounds, request.steps, request.trust).items():
        microseconds = {f"{name}_us": 1e6 * seconds for name, seconds in seconds_of._asdict().items()}
        row = {"experiment": config.name, "against": f"solver, {title}", "bar": f"<= {OVERHEADS[title]} µs"}
        reached = microseconds["overhead_us"] <= OVERHEADS[title]
        rows.append(row | microseconds | {"reached": reached, "load": machine()["load"]})
    return rows


def _text(results: dict[str, Any]) -> str:
    head = [*facts(results["machine"]), f"CPU time; medians of {results['rounds']} rounds of {results['steps']} steps"]
    return "\n".join([*head, "", *table(HEAD, [_cells(row) for row in results["rows"]])])


def _cells(row: dict[str, Any]) -> list[str]:
    names = [row["experiment"], row["against"]]
    if "not_measured" in row:
        return [*names, "", "", "not measured", "", row["not_measured"]]
    bar, reached = row["bar"], "yes" if row["reached"] else "no"
    if "overhead_us" in row:
        parts = f"network {row['network_us']:.0f} µs, solver {row['solver_us']:.0f} µs"
        return [*names, f"{row['loop_us']:.0f} µs", parts, f"overhead {row['overhead_us']:.0f} µs", bar, reached]
    ratio = f"{row['ratio']:.3f} ({min(row['rounds']):.3f} … {max(row['rounds']):.3f})"
    return [*names, f"{row['mmdiff_ms']:.1f} ms", f"{row['other_ms']:.1f} ms", ratio, bar, reached]
