"""The run folder: made, held by one training, and continued from what stands in it or in another one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mmdiff.config import Config, first_difference, load_config, save_config
from mmdiff.errors import InputError
from mmdiff.resolve import resolve_scheduler
from mmdiff.training import lock
from mmdiff.training.averages import SNAPSHOTS
from mmdiff.training.checkpoint import check_names_are_free, checkpoints, clear_leftovers, step_of
from mmdiff.training.disk import PARTIAL, whole
from mmdiff.training.learning_rate import knows_its_end
from mmdiff.training.process import on_main
from mmdiff.trust import check_links

# what may change between a checkpoint and the run that continues it in the same folder
RESUMABLE = {
    "output",
    "track",
    "sample",
    "evaluate",
    "data.cache_mib",
    "data.workers",
    *(
        f"train.{key}"
        for key in (
            "resume",
            "steps",
            "threads",
            "log_every",
            "gradients_every",
            "checkpoint_every",
            "keep_checkpoints",
            "sample_every",
            "sharding",
        )
    ),
}
MEASURED = ("latents_mean", "latents_std")  # settings of the anchor
FOLDERS, CONFIG, ORIGIN = ("checkpoints", "samples"), "config.yaml", "origin.json"


def with_measured(config: Config) -> Config:
    """The config with what its run has measured on the data, so that a run that goes on uses the same numbers.

    Args:
        config: as read; `train.resume` says which run goes on.
    """
    source = Path(config.train.resume)
    homes = {"never": (), "auto": (config.folder(),)}.get(config.train.resume, (source, source.parent.parent))
    for file in (home / CONFIG for home in homes):
        with contextlib.suppress(InputError):
            before = load_config(file).modalities.get(config.anchor)
            kept = {} if before is None else {n: v for n, v in before.settings().items() if n in MEASURED}
            own = config.modalities[config.anchor]
            update = {config.anchor: own.model_copy(update={**kept, **own.settings()})}
            return config.model_copy(update={"modalities": {**config.modalities, **update}})
    return config


@contextlib.contextmanager
def claimed(folder: Path, config: Config, accelerator: Accelerator) -> Iterator[Config]:
    """Make the run folder, or take the one that stands there; it is held against other trainings within the block.

    Nothing is ever overwritten: a folder that is not empty is continued with `train.resume=auto`, or refused.

    Args:
        folder: the run folder.
        config: resolved.
        accelerator: whose main process writes and holds the lock.

    Returns:
        The config as the folder has it: a run's origin stays, however it is continued.

    Raises:
        InputError: the folder is not free, or its run was started with other settings.
    """
    started = _started_with(folder, config)
    accelerator.wait_for_everyone()  # every process looks before one of them creates
    with contextlib.ExitStack() as held:

        def take() -> None:
            folder.mkdir(parents=True, exist_ok=started is not None or _is_half_made(folder))
            held.enter_context(lock.locked(folder))
            for name in FOLDERS:
                (folder / name).mkdir(exist_ok=True)
            clear_leftovers(folder / "checkpoints")
            clear_leftovers(folder / SNAPSHOTS)
            if started is None or started.train.steps != config.train.steps:
                write_config(folder, config)

        config = _with_origin(config, started)
        on_main(accelerator, take)
        if started is not None and started.train.steps != config.train.steps:
            accelerator.print(_extension(started, config))
        yield config


def _started_with(folder: Path, config: Config) -> Config | None:
    """The config with which the folder's run was started; None where a new run may begin.

    Raises:
        InputError: the folder cannot be taken for this experiment's.
    """
    if not folder.exists() or (config.train.resume == "auto" and _is_half_made(folder)):
        return None
    if config.train.resume != "auto":
        raise InputError(
            "output", str(folder), "exists; choose another output=…, or continue it with train.resume=auto"
        )
    check_links("output", folder)
    started = check_started_alike(folder, config)
    check_names_are_free(folder / "checkpoints")
    taken = [step_of(path) for path in checkpoints(folder / "checkpoints")]
    if taken and taken[-1] > config.train.steps:
        remedy = f"the run in {folder} has taken {taken[-1]} steps already; set more, or choose another output=…"
        raise InputError("train.steps", config.train.steps, remedy)
    return started


def _is_half_made(folder: Path) -> bool:
    """Whether a process was killed while it made the folder, so that nothing but the outline of a run is there."""
    if not folder.is_dir():
        return False
    for path in folder.iterdir():
        ours = path.name in (lock.NAME, f"{PARTIAL}{CONFIG}") or path.name.startswith(f".{lock.NAME}-")
        if not ours and not (path.name in FOLDERS and path.is_dir() and not any(path.iterdir())):
            return False
    return True


def check_started_alike(folder: Path, config: Config, may_change: set[str] = RESUMABLE) -> Config:
    """The config of a run folder that can be taken for this experiment's.

    Args:
        folder: that exists.
        config: resolved.
        may_change: keys in which they may differ.

    Raises:
        InputError: it is no run folder, or its run was started with other settings.
    """
    if not (folder / CONFIG).is_file():
        raise InputError("output", str(folder), f"exists and is no run folder (no {CONFIG}); choose another output=…")
    try:
        started = resolve_scheduler(load_config(folder / CONFIG))
    except InputError as error:
        remedy = f"its {CONFIG} is damaged ({error}); restore it, or continue in a new folder: train.resume={folder}"
        raise InputError("output", str(folder), remedy) from None
    difference = first_difference(started, config, ignore=may_change)
    if difference:
        key, before, now = difference
        raise InputError(
            key,
            now,
            f"the run in {folder} was started with {before!r}; restore it, choose another output=…, or continue in a "
            f"new folder: train.resume={folder}",
        )
    return started


def _with_origin(config: Config, started: Config | None) -> Config:
    """The config with the origin of the run, by its whole path: a run that is continued keeps its own."""
    origin = (started or config).train.resume
    origin = origin if origin in ("never", "auto") else str(Path(origin).expanduser().absolute())
    return config.model_copy(update={"train": config.train.model_copy(update={"resume": origin})})


def _extension(started: Config, config: Config) -> str:
    """What another number of steps means for a run that goes on."""
    line = f"train.steps: {started.train.steps} before, {config.train.steps} now"
    if not knows_its_end(config.train):
        return line
    return f"{line}; from here on the learning rate is that of a {config.train.lr_scheduler_type} over all of them"


def write_config(folder: Path, config: Config) -> None:
    """config.yaml, whole or not at all."""
    with whole(folder / CONFIG) as partial:
        save_config(config, partial)


def write_origin(folder: Path, origin: dict[str, Any]) -> None:
    """Where a run came from, whole or not at all."""
    with whole(folder / ORIGIN) as partial:
        partial.write_text(json.dumps(origin, indent=1) + "\n")
