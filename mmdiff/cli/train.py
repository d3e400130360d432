"""`mmdiff train`."""

from __future__ import annotations

from typing import Annotated

import typer

from mmdiff.cli.options import ConfigPath, Overrides, Trust, echo, is_main


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="take two steps on random values, and print their cost")
    ] = False,
    trust: Trust = False,
) -> None:
    """Train a model from an experiment's YAML file.

    On several GPUs call `accelerate launch -m mmdiff train …`, or torchrun.
    """
    from mmdiff.config import load_config

    loaded = load_config(config, overrides)
    if dry_run:
        from mmdiff.training.dry_run import dry_run as run_dry

        report = run_dry(loaded)
        if is_main():
            echo(report)
        return
    from mmdiff.training import train as run_training

    folder = run_training(loaded, trust_custom_modalities=trust)
    if is_main() and (folder / "pipeline").is_dir():
        echo(f"pipeline: {folder / 'pipeline'}\nsamples: {folder / 'samples' / f'step-{loaded.train.steps}.png'}")
        if loaded.evaluate.at_end:
            from mmdiff.evaluation.evaluate import Request, run

            echo(run(Request(folder, trust=True, trust_judges=trust)))  # the run is one's own, judges are not
