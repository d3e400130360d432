"""One optimizer step, and what a run saves of it."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from mmdiff import plots
from mmdiff.build import Experiment
from mmdiff.config import SampleConfig, TrainConfig
from mmdiff.data import Batch
from mmdiff.data.order import MicroBatches
from mmdiff.errors import InputError, TrainingError, at
from mmdiff.objective import BatchPosition, MTObjective
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.randomness import fold
from mmdiff.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mmdiff.training.disk import whole
from mmdiff.training.ema import Ema
from mmdiff.training.learning_rate import learning_rate
from mmdiff.training.muon import Muon
from mmdiff.training.process import on_main
from mmdiff.training.tracking import Window

#: Positions in the global batch, and what was read for them, in pieces.
MicroBatch = tuple[range, tuple[Batch | InputError, ...]]


class Trainer:
    """What one optimizer step needs, on this process."""

    def __init__(self, experiment: Experiment, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.table = experiment.config.train, accelerator, experiment.train
        self.full_config = experiment.config
        self.data: dict[str, Any] | None = None  # the data's fingerprint
        per_part = accelerator.num_processes * self.config.accumulate
        if self.config.batch_size % per_part:
            raise InputError(
                "train.batch_size",
                self.config.batch_size,
                f"is the global batch; it must be a multiple of {accelerator.num_processes} processes × "
                f"train.accumulate = {per_part}",
            )
        self.bare: MTObjective = experiment.objective
        self.bare.to(accelerator.device)
        self.objective, self.optimizer = accelerator.prepare(self.bare, make_optimizer(self.bare, self.config))
        self.ema = Ema(self.bare, self.config.ema_decay)

    def batches(self, first_step: int) -> MicroBatches:
        """The rows of this process from a step on."""
        config, data, accelerator = self.config, self.full_config.data, self.accelerator
        order = self.table.order(config.seed, data.streams, config.batch_size)
        share = accelerator.process_index, accelerator.num_processes
        size = config.batch_size // (config.accumulate * accelerator.num_processes)
        pieces = math.gcd(size, data.workers) if data.streaming and data.workers else 1  # a worker reads its streams
        return MicroBatches(order, first_step, config.steps, config.batch_size, config.accumulate, *share, pieces)

    def loader(self, first_step: int) -> Generator[tuple[int, Iterator[MicroBatch]], None, None]:
        """(step, its micro-batches) of this process from a step on, read ahead by `data.workers` processes."""
        batches = self.batches(first_step)
        loader = DataLoader(
            self.table,
            batch_sampler=batches,
            num_workers=self.full_config.data.workers,
            collate_fn=_as_read,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),  # leaves the global one, which dropout draws from, alone
        )
        positions = [batches.positions(part) for part in range(self.config.accumulate)]
        read = zip(*[iter(loader)] * batches.pieces, strict=True)
        for step in batches.steps:
            yield step, zip(positions, read, strict=False)  # takes as many batches as a step has parts

    def step(self, step: int, micro_batches: Iterable[MicroBatch]) -> dict[str, torch.Tensor]:
        """One optimizer step; returns this process's terms.

        Args:
            step: its number in the run, from 0.
            micro_batches: `train.accumulate` of them.
        """
        config, accelerator = self.config, self.accelerator
        torch.manual_seed(fold(config.seed, step, f"process {accelerator.process_index}"))  # dropout resumes too
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        total: dict[str, torch.Tensor] = {}
        for part, (share, pieces) in enumerate(micro_batches, start=1):
            batch = self._received(pieces)
            positions = torch.arange(share.start, share.stop, device=accelerator.device)
            position = BatchPosition(step, positions, config.batch_size)
            with contextlib.nullcontext() if part == config.accumulate else accelerator.no_sync(self.objective):
                output = self.objective(batch, position)
                accelerator.backward(output.loss / config.accumulate)
            for name, term in output.terms.items():
                total[name] = total.get(name, 0.0) + term / config.accumulate
        total["grad_norm"] = accelerator.clip_grad_norm_(self.bare.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(step)
        return total

    def _received(self, pieces: Sequence[Batch | InputError]) -> Batch:
        """What was read, on the device."""
        for piece in pieces:
            if isinstance(piece, InputError):
                with at(everywhere=False):  # only this process has read the row
                    raise piece
            self.table.unusable.add(piece.unusable)
        return Batch.joined([piece.to(self.accelerator.device) for piece in pieces])

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must state to be continued bit-equally."""
        return {
            "threads": torch.get_num_threads(),
            "processes": self.accelerator.num_processes,
            "torch": torch.__version__,
        }

    def save(self, folder: Path, step: int, window: Window) -> None:
        """Write a checkpoint from the main process; what that raises is raised on all."""
        rows = window.rows(self.accelerator)
        scaler = self.accelerator.scaler
        facts = self.facts() | {
            "scaler": scaler.state_dict() if scaler is not None else None,
            "data": self.data,
            "config": self.full_config.model_dump(mode="json"),
        }

        def write() -> None:
            check_finite(rows, window.names, step, self.config)
            keep = self.config.keep_checkpoints
            save_checkpoint(folder, step, self.bare, self.ema.averages, self.optimizer.optimizer, rows, facts, keep)

        on_main(self.accelerator, write)

    def load(self, checkpoint: Checkpoint) -> tuple[int, Window]:
        """Continue from a checkpoint: (steps taken, window)."""
        load_checkpoint(checkpoint, self.bare, self.ema, self.optimizer.optimizer)
        state = checkpoint.state
        for key, value in self.facts().items():
            if state.get(key) != value:
                warnings.warn(
                    f"{checkpoint.path.name} was written with {key} = {state.get(key)}, this run has {value}: it "
                    "continues, but not bit-equally",
                    stacklevel=2,
                )
        if state.get("scaler") is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return state["step"], Window(checkpoint.window)

    def save_grid(self, path: Path, sample: SampleConfig) -> Path:
        """Sample with the averaged weights."""
        with self.ema.swapped_in(), whole(path) as partial:
            plots.save_grid(self.pipeline(), partial, sample)
        return path

    def save_pipeline(self, path: Path) -> None:
        """The averaged weights as a pipeline."""
        with self.ema.swapped_in(), whole(path) as partial:
            self.pipeline().save_pretrained(partial)

    def pipeline(self) -> MTDiffusionPipeline:
        """A pipeline on the live model; learned weight schedules are written into its scheduler's config."""
        scheduler = self.bare.scheduler
        weights = {name: dict(entry) for name, entry in (scheduler.config.weights or {}).items()}
        for name, (parameters, log_scale) in self.bare.learned_weights().items():
            weights[name] |= {"parameters": parameters.tolist(), "log_scale": log_scale.item()}
        scheduler = type(scheduler).from_config(scheduler.config, weights=weights)
        pipeline = MTDiffusionPipeline(model=self.bare.model, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def make_optimizer(objective: MTObjective, config: TrainConfig) -> torch.optim.Optimizer:
    """`train.optimizer`; Muon is for the backbone's matrices, tables and heads stay with AdamW."""
    trained = [p for p in objective.parameters() if p.requires_grad]
    arguments = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trained, **arguments, fused=True)
    matrices = [p for p in objective.model.backbone.parameters() if p.requires_grad and p.ndim > 1]
    kept = {id(p) for p in matrices}
    return Muon(matrices, [p for p in trained if id(p) not in kept], **arguments)


def check_finite(rows: torch.Tensor, names: tuple[str, ...], done: int, config: TrainConfig) -> None:
    """Stop at the first step of the window with a non-finite term."""
    for offset, row in enumerate(rows):
        for name, value in zip(names, row.tolist(), strict=True):
            overflow = name == "grad_norm" and config.mixed_precision == "fp16"  # the scaler skips such steps
            if not math.isfinite(value) and not overflow:
                step = done - len(rows) + offset + 1
                raise TrainingError(
                    f"step {step}: {name} is {value} at learning rate {learning_rate(step - 1, config):.3g}; "
                    "nothing was saved after it; lower train.learning_rate or raise train.warmup"
                )


def _as_read(batch: Batch | InputError) -> Batch | InputError:
    return batch
