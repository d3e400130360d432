"""The training loop, top to bottom: set up, resume, step, log, checkpoint, finish."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from mmdiff import plots
from mmdiff.build import build
from mmdiff.config import Config
from mmdiff.training.averages import SNAPSHOTS
from mmdiff.training.console import Console
from mmdiff.training.disk import faults, whole
from mmdiff.training.launcher import obey_launcher
from mmdiff.training.learning_rate import learning_rate
from mmdiff.training.preflight import preflight
from mmdiff.training.process import StopSignal, make_accelerator, set_threads
from mmdiff.training.run_folder import claimed, with_measured
from mmdiff.training.start import check_origin, start
from mmdiff.training.tracking import Tracker, Window
from mmdiff.training.trainer import Trainer, check_finite
from mmdiff.training.watch import watched


def train(config: Config, progress: bool = True, trust_custom_modalities: bool = False) -> Path:
    """Train one experiment on the processes that Accelerate finds; returns the run folder.

    Args:
        config: of the experiment.
        progress: show a line of progress.
        trust_custom_modalities: of judges and of `train.initialize_from`, whose folders may be of others; the config's
            own are imported anyway.

    Raises:
        InputError: before anything is written, when the config, the data or the run folder do not fit.
        TrainingError: on a non-finite term, naming the step, the term and the learning rate; or where the disk or a
            process that reads data fails.
    """
    config = obey_launcher(config)
    set_threads(config.train.threads)
    accelerator = make_accelerator(config.train)
    experiment = build(with_measured(config))
    config, folder = experiment.config, experiment.config.folder()
    trainer = Trainer(experiment, accelerator)
    with faults(folder):
        preflight(experiment, trainer, trust_custom_modalities)
        check_origin(trainer, config, folder, trust_custom_modalities)
    with faults(folder), watched(accelerator.num_processes), claimed(folder, config, accelerator) as config:
        done, window = start(trainer, config, folder, trust_custom_modalities)
        log = Log(folder, trainer, done, progress)
        stopping = False
        with contextlib.closing(trainer.loader(done)) as steps, log.console, StopSignal() as stop:
            for step, micro_batches in steps:
                window.add(trainer.step(step, micro_batches))
                done = step + 1
                final, due = done == config.train.steps, done % config.train.log_every == 0
                log.step()
                if due or final:
                    log.line(done, window)
                stopping = stop.agreed(accelerator, due) and not final
                if trainer.ema.snapshots and (final or _every(config.train.ema_snapshot_every, done)):
                    trainer.save_snapshot(folder / SNAPSHOTS, done)  # before the checkpoint, behind which a run goes on
                if final or stopping or _every(config.train.checkpoint_every, done):
                    trainer.save(folder / "checkpoints", done, window)
                if stopping:
                    break
                if not final and _every(config.train.sample_every, done):
                    log.grid(trainer, done)

        if stopping:
            accelerator.print(f"stopped at step {done} of {config.train.steps}; continue with train.resume=auto")
        else:
            trainer.save_pipeline(folder / "pipeline", done)
            if config.train.lora is not None:
                trainer.save_adapter(folder / "adapter")
            log.grid(trainer, done)
        log.close()
    accelerator.end_training()
    return folder


class Log:
    """What a run says on its way: lines of metrics, one of progress, grids of samples; from the main process alone.

    Args:
        folder: the run folder.
        trainer: whose config is resolved, whose training rows count what was skipped, and whose main process writes.
        first_step: steps taken before.
        progress: show a line of progress.
    """

    def __init__(self, folder: Path, trainer: Trainer, first_step: int, progress: bool) -> None:
        self.folder, self.trainer, self.accelerator, self.table = folder, trainer, trainer.accelerator, trainer.table
        self.config, self.meter, main = trainer.full_config, trainer.meter, trainer.accelerator.is_main_process
        self.tracker = Tracker(folder, self.config, first_step) if main else None
        self.console = Console(self.config.train.steps, first_step, progress and main)
        self.console.say(str(self.meter))
        self.meter.restart()

    def step(self) -> None:
        """One more optimizer step."""
        self.meter.images += self.config.train.batch_size
        self.console.step()

    def line(self, done: int, window: Window) -> None:
        """Average the window into a line of metrics; every process must call it.

        Raises:
            TrainingError: where a term is not finite.
        """
        rows = window.rows(self.accelerator)
        check_finite(rows, window.names, done, self.config.train)
        means = dict(zip(window.names, rows.double().mean(0).tolist(), strict=True))
        means |= self._interference()
        line = {"step": done, **means, "learning_rate": learning_rate(done - 1, self.config.train)}
        if self.tracker:
            line |= self.meter.measure() | self._skipped()
            self.tracker.log(line)
            self.console.line(line)
        window.clear()
        self.meter.restart()

    def _interference(self) -> dict[str, float]:
        """What the step measured of gradients, averaged over processes."""
        measured = self.trainer.interference
        if not measured:
            return {}
        values = self.accelerator.reduce(torch.stack([measured[name] for name in sorted(measured)]), reduction="mean")
        return dict(zip(sorted(measured), values.tolist(), strict=True))

    def _skipped(self) -> dict[str, int]:
        """How many values were skipped, where they are: those that the main process has met."""
        return {"skipped_values": len(self.table.unusable.lines)} if self.config.data.on_error == "skip" else {}

    def grid(self, trainer: Trainer, done: int) -> None:
        """A picture of samples at a step; every process must call it."""
        path = trainer.save_grid(self.folder / "samples" / f"step-{done}.png", self.config.sample)
        if self.tracker:
            self.tracker.image("samples", path, done)
            self.meter.restart()

    def close(self) -> None:
        """Draw the curves, end the tracking, and say what was skipped."""
        if self.tracker:
            for count in self._skipped().values():
                self.accelerator.print(f"skipped values, which count as absent: {count} in {len(self.table)} rows")
            self.tracker.close()
            with whole(self.folder / "curves.png") as partial:
                plots.curves(self.tracker.path, partial)


def _every(interval: int, done: int) -> bool:
    return interval > 0 and done % interval == 0
