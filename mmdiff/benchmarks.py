"""`mmdiff benchmark …`: its commands. Heavy imports wait until one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

benchmark = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure against peers.")


@benchmark.command()
def speed(
    config: Annotated[Path, typer.Argument(help="an experiment's YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example train.steps=600")] = None,
    rounds: Annotated[int, typer.Option(help="interleaved rounds", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="steps per round", min=1)] = 10,
    against: Annotated[str, typer.Option(help="bare, anchor or solver")] = "bare",
) -> None:
    """A training step of mmdiff against a bare PyTorch loop, or against the same experiment with its anchor alone; or
    a sampling step against the bare solver."""
    from mmdiff.config import load_config

    loaded = load_config(config, overrides)
    from mmdiff.evaluation.speed import compare

    typer.echo(compare(loaded, rounds, steps, against))


@benchmark.command("fusion-speed")
def fusion_speed(
    sets: Annotated[int, typer.Option(help="sets in the batch", min=1)] = 64,
    largest: Annotated[int, typer.Option(help="members of the largest; the sizes run from 1 to it", min=1)] = 20,
    dim: Annotated[int, typer.Option(help="numbers of a member", min=1)] = 512,
    rounds: Annotated[int, typer.Option(help="rounds; medians are shown", min=1)] = 20,
    threads: Annotated[int, typer.Option(help="CPU threads", min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """The fusions of image sets on a ragged batch, against a loop over its sets."""
    from mmdiff.evaluation.fusion_speed import compare_fusions

    typer.echo(compare_fusions(sets, largest, dim, rounds, threads, device))
