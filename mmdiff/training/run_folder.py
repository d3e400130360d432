"""The run folder: made, or continued where its run was started with the same settings."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from mmdiff.config import Config, first_difference, load_config, save_config
from mmdiff.errors import InputError
from mmdiff.resolve import resolve_scheduler
from mmdiff.strangers import check_links
from mmdiff.training.checkpoint import checkpoints
from mmdiff.training.tracking import Window
from mmdiff.training.trainer import Trainer

# what may change between a checkpoint and the run that continues it
RESUMABLE = {
    "output",
    "track",
    "sample",
    "evaluate",
    "data.cache_mib",
    "data.workers",
    *(
        f"train.{key}"
        for key in ("resume", "threads", "log_every", "checkpoint_every", "keep_checkpoints", "sample_every")
    ),
}


def claim_folder(folder: Path, config: Config, trainer: Trainer, accelerator: Accelerator) -> tuple[int, Window]:
    """Make the run folder, or continue what stands in it: (steps taken, window). Never overwrites."""
    exists = folder.exists()
    accelerator.wait_for_everyone()  # every process looks before one of them creates
    if not exists:
        if accelerator.is_main_process:
            (folder / "checkpoints").mkdir(parents=True)
            (folder / "samples").mkdir()
            save_config(config, folder / "config.yaml")
        accelerator.wait_for_everyone()
        return 0, Window()
    if config.train.resume != "auto":
        raise InputError(
            "output", str(folder), "exists; choose another output=…, or continue it with train.resume=auto"
        )
    check_links("output", folder)
    check_started_alike(folder, config)
    newest = checkpoints(folder / "checkpoints")[-1:]
    return trainer.load(newest[0]) if newest else (0, Window())


def check_started_alike(folder: Path, config: Config) -> None:
    """A run folder can be taken for this experiment's.

    Args:
        folder: that exists.
        config: resolved.

    Raises:
        InputError: it is no run folder, or its run was started with other settings.
    """
    if not (folder / "config.yaml").is_file():
        raise InputError("output", str(folder), "exists and is no run folder (no config.yaml); choose another output=…")
    found = first_difference(resolve_scheduler(load_config(folder / "config.yaml")), config, ignore=RESUMABLE)
    if found:
        key, before, now = found
        raise InputError(
            key, now, f"the run in {folder} was started with {before!r}; restore it or choose another output=…"
        )
