"""A learning-rate sweep of short runs, then the whole training at a rate that fits its length; nothing is repeated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from mmdiff.benchmarks.cache import stored_json
from mmdiff.build import build_model, build_objective, build_scheduler, build_table, open_rows
from mmdiff.config import Config, load_config
from mmdiff.errors import InputError, TrainingError
from mmdiff.objective import BatchPosition
from mmdiff.resolve import resolve
from mmdiff.training.checkpoint import checkpoints
from mmdiff.training.loop import train
from mmdiff.training.run_folder import RESUMABLE, check_started_alike

SHORT, SHARE = 125, 4  # a short run takes so many steps, a quarter of the whole training's at most
HORIZON = 0.32  # the best rate falls with this power of the number of steps (Bjorck et al., 2025)
ROWS, DRAWS = 256, 4  # held-out rows, and times and states drawn for each, of the validation loss


def swept(config: Config, factors: Sequence[float], folder: Path, progress: bool = True) -> Path:
    """Train an experiment at a learning rate that short runs suggest; returns the run folder.

    Short runs stand in ``folder/sweeps/NAME/rate-…`` with their curves, the run is ``folder/runs/NAME``, and its
    ``sweep.json`` holds their validation losses. The run takes the best rate `over_steps` of its own number. Called
    again, it continues what was interrupted.

    Args:
        config: of the experiment; its `output` and `train.resume` do not count.
        factors: of `train.learning_rate`; a single one is taken without a sweep.
        folder: for all of it.
        progress: show progress bars.

    Raises:
        InputError: no positive factor, or a folder holds another run.
        TrainingError: training was told to stop, or cannot go on.
    """
    if not factors or min(factors) <= 0:
        raise InputError("--sweep", list(factors), "needs factors of the learning rate, numbers > 0")
    rates = [config.train.learning_rate * factor for factor in factors]
    steps = short_steps(config.train.steps)
    losses = {}
    for rate in rates if len(rates) > 1 else ():
        short = _trained(config, rate, steps, folder / "sweeps" / config.name / f"rate-{rate:g}", progress)
        losses[rate] = stored_json(short / "validation.json", partial(validation_loss, short))
    best = min(losses, key=losses.__getitem__) if losses else rates[0]
    chosen = over_steps(best, steps, config.train.steps) if losses else best
    run = _trained(config, chosen, config.train.steps, folder / "runs" / config.name, progress)
    record = {"chosen": chosen, "best": best, "steps": steps, "validation loss by learning rate": losses}
    (run / "sweep.json").write_text(json.dumps(record, indent=1) + "\n")
    return run


def short_steps(steps: int) -> int:
    """How many steps a short run takes."""
    return max(1, min(SHORT, steps // SHARE))


def over_steps(rate: float, short: int, steps: int) -> float:
    """The learning rate for ``steps`` steps where ``rate`` is best for ``short`` ones, to three digits."""
    return float(f"{rate * (short / steps) ** HORIZON:.3g}")


def _trained(config: Config, rate: float, steps: int, folder: Path, progress: bool) -> Path:
    settings = config.train.model_copy(update={"learning_rate": rate, "steps": steps, "resume": "auto"})
    config = config.model_copy(update={"train": settings, "output": str(folder)})
    if (folder / "pipeline" / "model_index.json").is_file():
        check_started_alike(folder, resolve(config, open_rows(config)[0]), RESUMABLE - {"train.steps"})
        return folder
    train(config, progress)
    if not (folder / "pipeline" / "model_index.json").is_file():
        raise TrainingError(f"stopped in {folder}; the same command continues it")
    return folder


@torch.no_grad()
def validation_loss(run: Path) -> float:
    """The training loss of a finished run's averaged weights on held-out rows; rows, times and states are the same in
    every run of one seed."""
    config = load_config(run / "config.yaml")
    _, held_out = open_rows(config)
    model = build_model(config)
    objective = build_objective(config, model, build_scheduler(config)).eval()
    averages = load_file(checkpoints(run / "checkpoints")[-1] / "ema.safetensors")
    objective.load_state_dict(objective.state_dict() | averages)
    batch = build_table(config, model, held_out.select(list(range(min(ROWS, len(held_out)))))).all()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, count = batch.to(device), len(next(iter(batch.present.values())))
    positions = torch.arange(count, device=device)
    losses = [objective.to(device)(batch, BatchPosition(draw, positions, count)).loss for draw in range(DRAWS)]
    return float(torch.stack(losses).mean())
