"""Where a run starts: at step 0, from weights of another model, or from a checkpoint of its own or of another run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmdiff.config import Config, first_difference, parse_config
from mmdiff.data.fingerprint import fingerprint
from mmdiff.errors import InputError
from mmdiff.training.checkpoint import Checkpoint, find_checkpoint, newest
from mmdiff.training.initialize import initialize, initialize_backbone
from mmdiff.training.process import on_main
from mmdiff.training.run_folder import RESUMABLE, write_origin
from mmdiff.training.tracking import Window
from mmdiff.training.trainer import Trainer

# what may change where a run continues in a new folder; the optimizer's moments belong to its kind
_CONTINUABLE = RESUMABLE | {"name", "data"}


def start(trainer: Trainer, config: Config, folder: Path, trust: bool = False) -> tuple[int, Window]:
    """Bring the trainer to where the run goes on: (steps taken, window).

    Args:
        trainer: fresh.
        config: of the run folder, whose `train.resume` is "never", "auto" or the folder that the run came from.
        folder: the run folder, that this training holds.
        trust: import the modalities that `train.initialize_from` names by import path and the config does not.

    Raises:
        InputError: a checkpoint, its data or another folder do not fit.
    """
    say = trainer.accelerator.print
    trainer.data = fingerprint(trainer.table.rows)
    own = newest(folder / "checkpoints", say)
    goes_on = own is not None or config.train.resume not in ("never", "auto")
    origin = {} if goes_on else _initialized(trainer, config, say, trust)
    trainer.prepare()
    if own is not None:
        _check_data(own, trainer.data, config, folder)
        return trainer.load(own)
    if config.train.resume not in ("never", "auto"):
        return _continue_from(trainer, config, folder)
    if origin:
        trainer.ema.restart()
        on_main(trainer.accelerator, lambda: write_origin(folder, origin))
    return 0, Window()


def _initialized(
    trainer: Trainer, config: Config, say: Callable[[str], object], trust: bool, write: bool = True
) -> dict[str, Any]:
    """What `origin.json` keeps of the weights that the config names; {} where a run starts from nothing."""
    if config.backbone.initialize_from is not None:
        return initialize_backbone(trainer.bare, config, say, trust, write)
    if config.train.initialize_from is not None:
        return initialize(trainer.bare, config.train.initialize_from, say, trust, write)
    return {}


def check_origin(trainer: Trainer, config: Config, folder: Path, trust: bool = False) -> None:
    """Refuse a folder that a new run cannot start from, before its own is made; arguments and errors as of `start`."""
    say = trainer.accelerator.print
    if folder.exists():
        return
    if config.train.resume not in ("never", "auto"):
        _check_model(find_checkpoint(Path(config.train.resume), "train.resume", say), config)
    else:
        _initialized(trainer, config, lambda line: None, trust, write=False)


def _check_data(checkpoint: Checkpoint, now: dict[str, Any], config: Config, folder: Path) -> None:
    """A run goes on with the rows that it was started with."""
    before = checkpoint.state.get("data")
    if before != now:
        remedy = (
            f"has {_described(now)}, but {checkpoint.path.name} was trained on {_described(before)}; restore the data, "
            f"or continue in a new folder: train.resume={folder} output=…"
        )
        raise InputError("data.source", config.data.source, remedy)


def _described(data: Any) -> str:
    if not isinstance(data, dict):
        return "unknown data"
    return f"{data.get('rows')} rows of {', '.join(data.get('columns', []))}, hash {data.get('hash')}"


def _continue_from(trainer: Trainer, config: Config, folder: Path) -> tuple[int, Window]:
    """Continue another run's checkpoint in this folder."""
    checkpoint = find_checkpoint(Path(config.train.resume), "train.resume", trainer.accelerator.print)
    _check_model(checkpoint, config)
    done, _ = trainer.load(checkpoint)
    origin = {
        "resume": str(checkpoint.path.resolve()),
        "step": done,
        "weights": _hash(checkpoint),
        "data": checkpoint.state.get("data"),
    }
    on_main(trainer.accelerator, lambda: write_origin(folder, origin))
    trainer.accelerator.print(f"continues {checkpoint.path} at step {done}")
    return done, Window()


def _hash(checkpoint: Checkpoint) -> str:
    return checkpoint.state["files"]["weights.safetensors"]


def _check_model(checkpoint: Checkpoint, config: Config) -> None:
    """The model and its objective must be those of the checkpoint, and steps must be left to take."""
    done = checkpoint.state["step"]
    if done >= config.train.steps:
        raise InputError(
            "train.steps", config.train.steps, f"{checkpoint.path} has taken {done} steps already; set more"
        )
    before = parse_config(checkpoint.state.get("config"))
    train = {f"train.{key}" for key in type(config.train).model_fields} - {"train.optimizer", "train.lora"}
    difference = first_difference(before, config, ignore=_CONTINUABLE | train)
    if difference:
        key, then, now = difference
        remedy = f"{checkpoint.path} has {then!r}; restore it, or take its weights alone with train.initialize_from"
        raise InputError(key, now, remedy)
