"""`mmdiff ema`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmdiff.cli.options import RunPath, Trust, echo, read_only


def ema(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="the pipeline, a new folder")],
    sigma_rel: Annotated[
        float | None, typer.Option(help="relative width of a power-function average, from the run's snapshots: 0.08")
    ] = None,
    decay: Annotated[
        float | None, typer.Option(help="of an exponential average that the run kept: one of train.ema_further_decays")
    ] = None,
    step: Annotated[int | None, typer.Option(help="of the snapshot where it ends; default: the last", min=1)] = None,
    trust: Trust = False,
) -> None:
    """Write a pipeline with another average of a run's weights.

    `mmdiff sample` and `mmdiff evaluate RUN --pipeline` take it.
    """
    read_only(trust)
    from mmdiff.training.averages import Request
    from mmdiff.training.averages import run as make_average

    echo(make_average(Request(run, out, sigma_rel, decay, step, trust), echo))
