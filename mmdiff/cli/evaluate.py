"""`mmdiff evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdiff.cli.options import Overrides, RunPath, Trust, echo, integers, read_only
from mmdiff.trust import check_links, refuse_custom

if TYPE_CHECKING:
    from mmdiff.config import Config


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
    trust: Trust = False,
) -> None:
    """Score every direction of a run on held-out rows.

    Prints a table, and writes evaluation.json to the run folder.
    """
    read_only(trust)
    ways = tuple(conditioning.split(",")) if conditioning else ()
    evaluate_run(run, overrides or [], integers("--steps", steps), solver, feedback, trust, trust, ways, subsets, bound)


def evaluate_run(
    run: Path,
    overrides: list[str],
    steps: tuple[int, ...],
    solver: str | None,
    feedback: str | None,
    trust: bool,
    trust_judges: bool,
    conditioning: tuple[str, ...] = (),
    subsets: bool = False,
    bound: bool = False,
) -> None:
    from mmdiff.config import load_config

    check_links("run", run)
    config: Config = load_config(run / "config.yaml", overrides)
    if not trust:
        refuse_custom(config.model_dump()["modalities"])
    from mmdiff.build import build_table, open_rows
    from mmdiff.evaluation import evaluate as evaluators
    from mmdiff.evaluation import report as records
    from mmdiff.grids import table
    from mmdiff.runs import load

    records.read(run / "evaluation.json")  # a broken one is named before the work
    pipeline = load(run, solver, trust)
    train, validation = (build_table(config, pipeline.model, rows) for rows in open_rows(config, hub=trust))
    result = evaluators.evaluate(
        pipeline, config, train, validation, steps, feedback, trust_judges, conditioning, subsets, bound
    )
    records.save(result, run / "evaluation.json")
    echo(records.table(result))
    for name, columns in result.pictures.items():
        path = run / "samples" / f"evaluation-{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        table(columns).save(path)
        echo(f"wrote {path}")
