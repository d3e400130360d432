"""The whole config used once before step 1: sampling, pictures, saving and evaluation, at the smallest size."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mmdiff import plots
from mmdiff.build import Experiment, state_probabilities
from mmdiff.config import Config
from mmdiff.data import Batch
from mmdiff.errors import InputError, at
from mmdiff.evaluation.readiness import check_evaluation
from mmdiff.lora import merged
from mmdiff.model import MTDiffusionModel
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.training.trainer import Trainer

ROWS = 8  # real rows that are encoded
LARGEST, SMALLEST = 10.0, 0.01  # root mean square of an anchor's encodings; the noise has 1
_KEYS = {  # {argument of the pipeline or the solver: key of the config}
    "num_inference_steps": "sample.steps",
    **{name: f"sample.{name}" for name in ("feedback", "order", "read", "read_steps")},
    "guidance_scale": "sample.guidance",
    "solver_config.steps_offset": "scheduler.solver_config.steps_offset",
}


def preflight(experiment: Experiment, trainer: Trainer, trust_judges: bool = False) -> None:
    """Everything that a run does after its training, done once in small; nothing is kept and no random state moves.

    Args:
        experiment: as it was built.
        trainer: of the same experiment, before its first step.
        trust_judges: import what the folders of `evaluate.judges` name.

    Raises:
        InputError: naming the setting that would have failed after the training.
    """
    if not trainer.accelerator.is_main_process:
        return
    with at(everywhere=False):  # the other processes do not look
        _use_everything(experiment, trainer, trust_judges)


def _use_everything(experiment: Experiment, trainer: Trainer, trust_judges: bool) -> None:
    config, model = experiment.config, trainer.bare.model
    check_learns(config, model)
    with _undisturbed(model):
        check_encodings(config, model, experiment.train.batch(range(min(ROWS, len(experiment.train)))))
        pipeline = trainer.pipeline()
        check_sampling(config, pipeline)
        check_saving(pipeline)
        check_evaluation(config, model, experiment.train, experiment.validation, trust_judges)


@contextlib.contextmanager
def _undisturbed(model: MTDiffusionModel) -> Iterator[None]:
    """In evaluation mode; the modes and the random states come back."""
    modes = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def check_learns(config: Config, model: MTDiffusionModel) -> None:
    """Something is denoised or read, and learns.

    Raises:
        InputError: no term of the loss can ever count.
    """
    missing = config.data.missing
    for name in sorted(name for name, share in missing.items() if share == 1):
        lost = "anchor, so nothing is denoised" if name == config.anchor else "value, so nothing of it is learned"
        _warn(f"data.missing.{name} = 1.0: hides every {lost}")
    denoised = state_probabilities(config, config.anchor).observed < 1 and config.states.anchor_hidden < 1
    read = [n for n in model.generated if config.modalities[n].loss_weight > 0 and missing.get(n) != 1]
    if denoised:
        return
    hidden = config.states.anchor_hidden == 1
    key = "states.anchor_hidden" if hidden else "states.anchor_observed"
    share = config.states.anchor_hidden if hidden else state_probabilities(config, config.anchor).observed
    if not read:
        remedy = "nothing is denoised then, and no modality has a loss_weight above 0: nothing is learned"
        raise InputError(key, share, remedy)
    _warn(f"{key} = {share}: {config.anchor} is never denoised, only read")


def check_encodings(config: Config, model: MTDiffusionModel, rows: Batch) -> None:
    """The anchor's encodings have the scale of the noise, and clipping does not cut them.

    Raises:
        InputError: naming scale, clip_sample_range, or an encoder that would miss the images.
    """
    if config.loss.repa is not None and not rows.values[config.anchor].numel():
        raise InputError("loss.repa.model", config.loss.repa.model, "reads images, but the data hold latents alone")
    present = rows.present[config.anchor]
    if not present.any():
        return
    with at(f"modalities.{config.anchor}"):
        anchor, stored = model.modalities[config.anchor], rows.values.get(f"{config.anchor}/latents")
        value = rows.values[config.anchor][present].to(model.device)
        stored = None if stored is None else stored[present].to(model.device)
        anchor.prepare(value, lambda shape: value.new_zeros(len(value), *shape), stored)
        encoded = anchor.encode(value).float()
    size, largest = float(encoded.square().mean().sqrt()), float(encoded.abs().max())
    key, scale = f"modalities.{config.anchor}.scale", config.modalities[config.anchor].settings().get("scale", 1.0)
    if not size <= LARGEST:  # NaN, too
        raise InputError(key, scale, f"the encodings' root mean square is {size:.3g}; the noise has 1, choose it near")
    if 0 < size < SMALLEST:
        _warn(f"{key} = {scale}: the encodings' root mean square is {size:.3g}; the noise has 1")
    reach = config.scheduler.clip_sample_range
    if config.scheduler.clip_sample and largest > reach * 1.001:
        raise InputError(
            "scheduler.clip_sample_range", reach, f"cuts the data: encodings reach {largest:.3g}; set it to that"
        )


def check_sampling(config: Config, pipeline: MTDiffusionPipeline) -> None:
    """The settings of `sample`, a walk of the solver in all its steps, and a picture of samples in two.

    Raises:
        InputError: naming a key of `sample`, or the solver where samples are not finite.
    """
    for name in config.sample.guidance:
        if name not in pipeline.model.observable or name == pipeline.model.anchor:
            able = ", ".join(sorted(set(pipeline.model.observable) - {pipeline.model.anchor})) or "none"
            raise InputError(f"sample.guidance.{name}", config.sample.guidance[name], f"can be guided: {able}")
    if (config.sample.read_steps or 1) > len(pipeline.scheduler):
        remedy = f"is above scheduler.num_train_timesteps = {len(pipeline.scheduler)}"
        raise InputError("sample.read_steps", config.sample.read_steps, remedy)
    with at(keys=_KEYS):
        _walk(pipeline, config.sample.steps)
        few = {"steps": min(2, config.sample.steps)} | ({"read_steps": 1} if pipeline.model.gains else {})
        few = config.sample.model_copy(update=few)
        with tempfile.TemporaryDirectory(prefix="mmdiff-") as folder:
            plots.save_grid(pipeline, Path(folder) / "grid.png", few, columns=1)


def _walk(pipeline: MTDiffusionPipeline, steps: int) -> None:
    """All steps of the solver with a network that says 0."""
    scheduler, generator = pipeline.scheduler, torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    z = torch.randn(1, 1, 2, 2, generator=generator)
    for time in scheduler.steps[:-1]:
        z = scheduler.step(torch.zeros_like(z), time, z, {}, generator=generator, return_dict=False)[0]
    if not z.isfinite().all():
        config = scheduler.config
        remedy = f"is not finite after sample.steps = {steps} with solver_config {config.solver_config}; change them"
        raise InputError("scheduler.solver", config.solver, remedy)


def check_saving(pipeline: MTDiffusionPipeline) -> None:
    """What is saved is read back as the same weights.

    Raises:
        InputError: the pipeline cannot be saved, or comes back as another one.
    """
    before = merged(pipeline.model).state_dict()
    with tempfile.TemporaryDirectory(prefix="mmdiff-") as folder:
        pipeline.save_pretrained(folder)
        after = _read_back(lambda: MTDiffusionPipeline.from_pretrained(folder, trust_custom_modalities=True))
    for name, value in before.items():
        if name not in after or not torch.equal(after[name], value.cpu()):
            raise InputError("modalities", name, "does not come back from a saved pipeline; register it in the module")


def _read_back(load: Callable[[], MTDiffusionPipeline]) -> dict[str, Tensor]:
    return load().model.state_dict()


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
