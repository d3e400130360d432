"""One optimizer step, and what a run saves of it."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from accelerate import Accelerator
from torch.utils.data import DataLoader

from mmdiff import lora, plots
from mmdiff.build import Experiment, build_model, build_objective
from mmdiff.config import SampleConfig, TrainConfig
from mmdiff.data import Batch
from mmdiff.data.order import MicroBatches
from mmdiff.errors import InputError, TrainingError, at
from mmdiff.objective import BatchPosition, MTObjective
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.randomness import fold
from mmdiff.training.averages import new_snapshot, pipeline_of, save_average, write_average
from mmdiff.training.checkpoint import Checkpoint
from mmdiff.training.disk import whole
from mmdiff.training.ema import Ema
from mmdiff.training.interference import interference
from mmdiff.training.learning_rate import learning_rate
from mmdiff.training.meter import Meter
from mmdiff.training.muon import Muon
from mmdiff.training.process import on_main, seed_generators
from mmdiff.training.sharding import find_parallel
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
        if self.bare.needs_pairs and self.config.batch_size // per_part % 2:
            remedy = f"each of its {per_part} parts must have an even number of rows: loss pairs neighbours"
            raise InputError("train.batch_size", self.config.batch_size, remedy)
        self.bare.to(accelerator.device)
        self.meter = Meter(self.bare.model, accelerator, self.config.mixed_precision)
        self.parallel = find_parallel(accelerator, self.config)
        if self.config.gradients_every and self.config.sharding != "none":
            remedy = "gradients of terms need whole weights on every process; set it to 0 or train.sharding to none"
            raise InputError("train.gradients_every", self.config.gradients_every, remedy)
        self.interference: dict[str, torch.Tensor] = {}  # of the last step, where it was measured
        self.ema: Ema | None = None
        if not self.parallel.late:
            self.prepare()

    def prepare(self) -> None:
        """Lay the state out over the processes, once, when the weights have their first values."""
        config = self.config
        if self.ema is None:
            self.parallel.lay_out(self.bare, make_optimizer)
            if config.compile:
                # a graph that several backward passes read keeps its buffers
                torch._functorch.config.donated_buffer = not config.gradients_every
                self.bare.model.backbone.compile_blocks()
            self.ema = Ema(self.bare, (config.ema_decay, *config.ema_further_decays), config.ema_sigma_rel)

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
        config, accelerator, parallel = self.config, self.accelerator, self.parallel
        # dropout resumes too
        seed_generators(fold(config.seed, step, f"process {accelerator.process_index}"), accelerator.device)
        for group in parallel.optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        total: dict[str, torch.Tensor] = {}
        self.interference = {}
        for part, (share, pieces) in enumerate(micro_batches, start=1):
            batch = self._received(pieces)
            positions = torch.arange(share.start, share.stop, device=accelerator.device)
            position = BatchPosition(step, positions, config.batch_size)
            last = part == config.accumulate
            with parallel.part(last):
                output = parallel.objective(batch, position)
                if part == 1 and config.gradients_every and (step + 1) % config.gradients_every == 0:
                    self.interference = interference(output.parts, self.bare.model.backbone.parameters())
                parallel.backward(output.loss / config.accumulate, last)
            for name, term in output.terms.items():
                total[name] = total.get(name, 0.0) + term / config.accumulate
        total["grad_norm"] = parallel.update()
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
            "sharding": self.config.sharding,
        }

    def save(self, folder: Path, step: int, window: Window) -> None:
        """Write a checkpoint; every process must call it, and what one of them meets is raised on all."""
        rows = window.rows(self.accelerator)
        check_finite(rows, window.names, step, self.config)  # the same rows everywhere
        scaler = self.accelerator.scaler
        facts = self.facts() | {
            "scaler": scaler.state_dict() if scaler is not None else None,
            "data": self.data,
            "config": self.full_config.model_dump(mode="json"),
        }
        self.parallel.save(folder, step, self.ema, rows, facts)

    def load(self, checkpoint: Checkpoint) -> tuple[int, Window]:
        """Continue from a checkpoint: (steps taken, window)."""
        self.parallel.load(checkpoint, self.ema)
        state = checkpoint.state
        for key, value in self.facts().items():
            before = state.get(key, "none")
            if before != value:
                warnings.warn(
                    f"{checkpoint.path.name} was written with {key} = {before}, this run has {value}: it "
                    "continues, but not bit-equally",
                    stacklevel=2,
                )
        if state.get("scaler") is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return state["step"], Window(checkpoint.window)

    def save_grid(self, path: Path, sample: SampleConfig) -> Path:
        """Sample with the averaged weights; every process must call it, the main one writes."""
        with self.averaged() as pipeline:
            if pipeline is not None:
                with whole(path) as partial:
                    plots.save_grid(pipeline, partial, sample)
        return path

    def save_pipeline(self, path: Path, step: int) -> None:
        """The averaged weights as a pipeline, and which average they are; every process must call it."""
        with self.averaged() as pipeline:
            if pipeline is not None:
                with whole(path) as partial:
                    pipeline.save_pretrained(partial)
                    write_average(partial, self.ema.label, step)

    def save_snapshot(self, folder: Path, step: int) -> None:
        """The power-function averages in a folder that stays; every process must call it."""
        final, dtype = folder / f"step-{step}", getattr(torch, self.config.ema_snapshot_dtype)
        with contextlib.ExitStack() as held:  # of the main process
            on_main(self.accelerator, lambda: held.enter_context(new_snapshot(final)))
            for label in self.ema.snapshots:
                averages = self.parallel.whole(self.ema.kept[label])
                on_main(self.accelerator, lambda label=label, whole=averages: save_average(final, label, whole, dtype))
            on_main(self.accelerator, held.close)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[MTDiffusionPipeline | None]:
        """A pipeline with the averaged weights on the main process, None on the others."""
        parallel = self.parallel
        if parallel.in_place:
            with self.ema.swapped_in():
                yield self.pipeline() if self.accelerator.is_main_process else None
            return
        state = parallel.whole({**self.bare.state_dict(), **self.ema.averages})
        yield self.whole_pipeline(state) if self.accelerator.is_main_process else None

    def whole_pipeline(self, state: Mapping[str, torch.Tensor]) -> MTDiffusionPipeline:
        """A pipeline of its own from a whole state of the objective."""
        config = self.full_config
        objective = build_objective(config, build_model(config, initial_weights=False), self.bare.scheduler)
        objective.load_state_dict(state)
        return pipeline_of(objective.to(self.accelerator.device))

    def save_adapter(self, path: Path) -> None:
        """The averaged LoRA layers, and what was trained with them; every process must call it."""
        with self.averaged() as pipeline:
            if pipeline is not None:
                with whole(path) as partial:
                    lora.save(pipeline.model, partial)

    def pipeline(self) -> MTDiffusionPipeline:
        """A pipeline on the live model."""
        return pipeline_of(self.bare)


def make_optimizer(objective: MTObjective, config: TrainConfig) -> torch.optim.Optimizer:
    """`train.optimizer`; Muon is for the backbone's matrices, tables and heads stay with AdamW.

    Learned weights of the loss do not decay: a decay would draw them to the fixed ones.
    """
    kept = {id(p) for p in objective.log_weights.parameters()}
    trained = [p for p in objective.parameters() if p.requires_grad and id(p) not in kept]
    arguments = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, **arguments, fused=True)
    else:
        matrices = [p for p in objective.model.backbone.matrices() if p.requires_grad]
        orthogonal = {id(p) for p in matrices}
        optimizer = Muon(matrices, [p for p in trained if id(p) not in orthogonal], **arguments)
    if kept:
        group = {"params": list(objective.log_weights.parameters()), "weight_decay": 0.0}
        optimizer.add_param_group(group | ({"orthogonal": False} if config.optimizer == "muon" else {}))
    return optimizer


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
