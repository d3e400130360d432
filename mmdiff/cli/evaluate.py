"""`mmdiff evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmdiff.cli.options import Overrides, RunPath, Trust, echo, integers, read_only


def evaluate(
    run: RunPath,
    overrides: Overrides = None,
    steps: Annotated[str | None, typer.Option(help="numbers of solver steps to compare: 10,20,200")] = None,
    solver: Annotated[str | None, typer.Option(help="another solver: DDIMScheduler")] = None,
    feedback: Annotated[str | None, typer.Option(help="of unknown aggregated modalities: draw, mean or mode")] = None,
    conditioning: Annotated[
        str | None,
        typer.Option(
            help="methods to compare: concatenation,aggregation,head-guidance,replacement,concatenation+aggregation …"
        ),
    ] = None,
    subsets: Annotated[bool, typer.Option("--subsets", help="score every subset of conditions instead")] = False,
    bound: Annotated[
        bool, typer.Option("--elbo", help="the bound on the log-likelihood instead, in nats and bits per dimension")
    ] = False,
    pipeline: Annotated[
        Path | None, typer.Option(help="a pipeline that `mmdiff ema` wrote, in place of the run's own")
    ] = None,
    trust: Trust = False,
) -> None:
    """Score every direction of a run on held-out rows.

    Prints a table, and writes evaluation.json to the run folder.
    """
    read_only(trust)
    methods, counts = tuple(conditioning.split(",")) if conditioning else (), integers("--steps", steps)
    from mmdiff.evaluation.evaluate import Request
    from mmdiff.evaluation.evaluate import run as evaluate_run

    settings = counts, solver, feedback, methods, subsets, bound, trust, trust, pipeline
    echo(evaluate_run(Request(run, tuple(overrides or ()), *settings)))
