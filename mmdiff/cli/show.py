"""`mmdiff show`: what an experiment is, in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdiff.cli.options import ConfigPath, Overrides, Trust, echo, read_only
from mmdiff.trust import refuse_custom

if TYPE_CHECKING:
    from mmdiff.config import Config
    from mmdiff.data import Rows
    from mmdiff.model import MTDiffusionModel
    from mmdiff.schedulers import MTScheduler

_BARS = "▁▂▃▄▅▆▇█"


def show(
    config: ConfigPath,
    overrides: Overrides = None,
    plot: Annotated[Path | None, typer.Option(help="write the weight schedules as a PNG")] = None,
    trust: Trust = False,
) -> None:
    """Print an experiment: settings, sizes, weight schedules."""
    from mmdiff.config import load_config

    read_only(trust)
    loaded = load_config(config, overrides)
    if not trust:
        refuse_custom(loaded.model_dump()["modalities"])
    from mmdiff.build import build_model, build_scheduler, open_rows
    from mmdiff.resolve import needs_data, resolve
    from mmdiff.sizes import build_buckets

    splits = open_rows(loaded, hub=trust) if needs_data(loaded) or loaded.data.buckets else None
    resolved = resolve(loaded, splits[0] if splits else None)
    scheduler, model = build_scheduler(resolved), build_model(resolved, initial_weights=False)
    echo(describe(resolved, model, scheduler, splits))
    if splits and (buckets := build_buckets(resolved, model, splits[0])):
        for (height, width), count in zip(buckets.sizes, buckets.counts, strict=True):
            echo(f"bucket {width}x{height:<12} {count:>8} rows")
    if plot is not None:
        from mmdiff.plots import weight_schedules

        echo(f"wrote {weight_schedules(scheduler, plot)}")


def describe(config: Config, model: MTDiffusionModel, scheduler: MTScheduler, splits: tuple[Rows, Rows] | None) -> str:
    """The resolved config, parameter counts, weight schedules and, where the data were opened, their rows."""
    from mmdiff.config import as_yaml

    lines = [as_yaml(config).rstrip(), ""]
    if splits is not None:
        lines.append(f"rows: {len(splits[0])} for training, {len(splits[1])} held out")
    lines.append(f"diffusion space: {tuple(model.space)}")
    counts = {"backbone": model.backbone, **dict(model.modalities.items())}
    for name, module in counts.items():
        lines.append(f"parameters, {name:<12} {sum(p.numel() for p in module.parameters()):>12,}")
    lines.append(f"parameters, {'all':<12} {sum(p.numel() for p in model.parameters()):>12,}")
    return "\n".join([*lines, "", *weights(scheduler)])


def weights(scheduler: MTScheduler, columns: int = 48) -> list[str]:
    """One line per modality: W_t from t = 1 to T, its peak, where it lies, and what is left at T."""
    lines = []
    tables = {"s_t anchor": scheduler.path.signal}
    tables |= {f"W_t {name}": scheduler.cumulative_weights(name) for name in sorted(scheduler.config.weights or {})}
    for name, table in tables.items():
        table = table.detach()
        peak = float(table.max())
        picked = table[[round(i * (len(table) - 1) / (columns - 1)) for i in range(columns)]].tolist()
        bars = "".join(_BARS[min(7, int(8 * value / peak))] if peak > 0 else _BARS[0] for value in picked)
        lines.append(f"{name:<14}{bars}  peak {peak:.3g} at t = {int(table.argmax()) + 1}, at T {float(table[-1]):.2g}")
    return lines
