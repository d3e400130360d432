"""Which average of the weights a pipeline has; snapshots of power-function averages, and any width from them."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmdiff.build import build_model, build_objective, build_scheduler
from mmdiff.config import Config, load_config
from mmdiff.errors import InputError, TrainingError
from mmdiff.objective import MTObjective
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.training.checkpoint import Checkpoint, checkpoints, find_checkpoint, step_of
from mmdiff.training.disk import PARTIAL, remove, whole
from mmdiff.training.ema import first_average
from mmdiff.training.sealed import DamagedError, check_hash, read_state, read_tensors, seal
from mmdiff.training.width import coefficients, exponent
from mmdiff.trust import check_links, refuse_custom

AVERAGE, SNAPSHOTS = "average.json", "snapshots"
_FILE = re.compile(r"sigma_rel=([0-9.e-]+)\.safetensors")
_WORST = 0.2  # share of the wanted profile that snapshots may miss


def write_average(pipeline: Path, label: str, step: int, **facts: object) -> None:
    """Say in a pipeline folder which average its weights are."""
    (pipeline / AVERAGE).write_text(json.dumps({"average": label, "step": step, **facts}, indent=1) + "\n")


def read_average(pipeline: Path) -> dict[str, Any]:
    """What `write_average` wrote; {} in a folder that does not say it.

    Raises:
        InputError: it cannot be read.
    """
    file = pipeline / AVERAGE
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise InputError("pipeline", str(file), f"is damaged: {error}") from None
    if not isinstance(facts, dict):
        raise InputError("pipeline", str(file), "is damaged: no mapping")
    return facts


def pipeline_of(objective: MTObjective) -> MTDiffusionPipeline:
    """A pipeline on an objective's model; learned weight schedules are written into its scheduler's config."""
    scheduler = objective.scheduler
    weights = {name: dict(entry) for name, entry in (scheduler.config.weights or {}).items()}
    for name, (parameters, log_scale) in objective.learned_weights().items():
        weights[name] |= {"parameters": parameters.tolist(), "log_scale": log_scale.item()}
    scheduler = type(scheduler).from_config(scheduler.config, weights=weights)
    pipeline = MTDiffusionPipeline(model=objective.model, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ------------------------------------------------------------------------------------------------------------ snapshots


@contextlib.contextmanager
def new_snapshot(final: Path) -> Iterator[None]:
    """A folder for `save_average`, which stands under the name ``final`` whole or not at all."""
    final.parent.mkdir(exist_ok=True)
    if final.exists():  # a run that was killed takes its last steps again
        remove(final)
    with whole(final) as partial:
        partial.mkdir()
        yield
        seal(partial, {"step": step_of(final)})


def save_average(final: Path, label: str, averages: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write one average of the snapshot that becomes ``final``.

    Args:
        final: its name.
        label: of the average.
        averages: whole tensors.
        dtype: of the file.

    Raises:
        TrainingError: an average is not finite in this precision.
    """
    plain = {name: tensor.detach().to(device="cpu", dtype=dtype).contiguous() for name, tensor in averages.items()}
    for name, tensor in plain.items():
        if not tensor.isfinite().all():
            remedy = "lower train.learning_rate, or set train.ema_snapshot_dtype=float32"
            raise TrainingError(f"{final.name}: the average of {name} is not finite as {dtype}; {remedy}")
    save_file(plain, final.with_name(f"{PARTIAL}{final.name}") / f"{label}.safetensors")


# ---------------------------------------------------------------------------------------------------------- mmdiff ema


@dataclass(frozen=True)
class Request:
    """Which average is made of a run.

    Attributes:
        run: the run folder.
        out: a new pipeline folder.
        sigma_rel: relative width of a power-function average, of the snapshots.
        decay: of an exponential average, of the newest checkpoint.
        step: of the snapshot where the average ends; None: the last.
        trust: import the modalities that the run names by import path.
    """

    run: Path
    out: Path
    sigma_rel: float | None = None
    decay: float | None = None
    step: int | None = None
    trust: bool = False


def run(request: Request, say: Callable[[str], object] = print) -> str:
    """Write a pipeline with an average of the weights; what was written.

    Raises:
        InputError: the run does not hold the average, or a folder does not fit.
    """
    folder, out = request.run, request.out
    if not (folder / "config.yaml").is_file():
        raise InputError("run", str(folder), "is no run folder (no config.yaml)")
    if out.exists() or not out.parent.is_dir():
        why = "exists; choose another folder" if out.exists() else "stands in no folder; make its parent first"
        raise InputError("--out", str(out), why)
    if (request.sigma_rel is None) == (request.decay is None):
        raise InputError("--sigma-rel", request.sigma_rel, "name one average: --sigma-rel 0.05, or --decay 0.999")
    check_links("run", folder)
    config = load_config(folder / "config.yaml")
    if not request.trust:
        refuse_custom(config.model_dump()["modalities"])
    checkpoint = find_checkpoint(folder, "run", say)
    if request.decay is not None:
        label, averages, facts = f"decay={request.decay}", _kept(checkpoint, config, request.decay), {}
        step = checkpoint.state["step"]
    else:
        label = f"sigma_rel={request.sigma_rel}"
        averages, step, facts = reconstructed(folder, request.sigma_rel, request.step)
    pipeline = _pipeline(config, checkpoint, averages)
    with whole(out) as partial:
        pipeline.save_pretrained(partial)
        write_average(partial, label, step, **facts)
    missed = f"; {facts['snapshots']} snapshots miss {100 * facts['missed']:.2g} % of its profile" if facts else ""
    return f"wrote {out}: {label} at step {step}{missed}"


def _pipeline(config: Config, checkpoint: Checkpoint, averages: Mapping[str, Tensor]) -> MTDiffusionPipeline:
    objective = build_objective(config, build_model(config, initial_weights=False), build_scheduler(config))
    objective.load_state_dict({**checkpoint.weights, **averages})
    return pipeline_of(objective)


def _kept(checkpoint: Checkpoint, config: Config, decay: float) -> dict[str, Tensor]:
    """An exponential average of a checkpoint."""
    train = config.train
    if decay not in (train.ema_decay, *train.ema_further_decays):
        able = ", ".join(map(str, (train.ema_decay, *train.ema_further_decays)))
        raise InputError("--decay", decay, f"the run keeps {able}; set train.ema_further_decays before a training")
    if decay == train.ema_decay:
        return first_average(checkpoint.ema)
    prefix = f"decay={decay}/"
    prefixed = {name: tensor for name, tensor in checkpoint.ema.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in prefixed.items()}


def reconstructed(run: Path, sigma_rel: float, step: int | None) -> tuple[dict[str, Tensor], int, dict[str, float]]:
    """A power-function average from the snapshots of a run, by least squares (Karras et al., 2024, section 3).

    Args:
        run: the run folder.
        sigma_rel: its relative width.
        step: where it ends; None: at the last snapshot.

    Returns:
        ``(averages, step, {"missed": the part of the wanted profile that the snapshots miss, "snapshots": how many})``.

    Raises:
        InputError: there are no snapshots, one is damaged, or they cannot add up to this width.
    """
    if not 1e-3 <= sigma_rel <= 0.28:
        raise InputError("--sigma-rel", sigma_rel, "needs 0.001 … 0.28")
    folders = checkpoints(run / SNAPSHOTS)
    if not folders:
        remedy = "holds no snapshots; set train.ema_sigma_rel=[0.05,0.1] and train.ema_snapshot_every before a training"
        raise InputError("run", str(run), remedy)
    steps = [step_of(folder) for folder in folders]
    last = steps[-1] if step is None else step
    if last not in steps:
        raise InputError("--step", step, f"has no snapshot; there are {', '.join(map(str, steps))}")
    files = [file for folder in folders if step_of(folder) <= last for file in _files(folder)]
    gammas = [exponent(float(_FILE.fullmatch(file.name)[1])) for file in files]
    factors, missed = coefficients([step_of(file.parent) for file in files], gammas, last, exponent(sigma_rel))
    if missed > _WORST:
        remedy = f"{len(files)} snapshots miss {100 * missed:.0f} % of its profile; choose a width nearer to theirs"
        raise InputError("--sigma-rel", sigma_rel, remedy)
    total: dict[str, Tensor] = {}
    for file, factor in zip(files, factors, strict=True):
        for name, tensor in read_tensors(file).items():
            part = float(factor) * tensor.double()
            total[name] = total[name] + part if name in total else part
    averages = {name: tensor.float() for name, tensor in total.items()}
    return averages, last, {"missed": missed, "snapshots": len(files)}


def _files(folder: Path) -> list[Path]:
    """The averages of a snapshot, whose hashes are right."""
    try:
        state = read_state(folder)
        files = [folder / name for name in sorted(state["files"]) if _FILE.fullmatch(name)]
        for file in files:
            check_hash(file, state)
    except DamagedError as error:
        raise InputError("run", str(folder), f"is damaged: {error}; restore it, or remove it") from None
    return files
