"""`mmdiff sample`: observed values from what a person types, grids of what was drawn, and a file per sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image

from mmdiff.errors import InputError, at
from mmdiff.grids import sample_grid
from mmdiff.model import MTDiffusionModel
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.plots import set_weights
from mmdiff.randomness import fold
from mmdiff.training.process import set_threads
from mmdiff.trust import check_links, damage

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FEW = 8  # numbers of an array that are printed
_LONGEST = 2000  # characters of what is printed per modality


def load(run: Path, solver: str | None = None, trust: bool = False, lora: Path | None = None) -> MTDiffusionPipeline:
    """The pipeline of a run folder, or a pipeline folder itself, on the accelerator if there is one.

    Args:
        run: the folder.
        solver: in place of the run's.
        trust: import the modalities and encoders that it names by import path.
        lora: folder of an adapter that is merged into it.

    Raises:
        InputError: if it holds no finished pipeline, or a damaged one.
    """
    folder = run / "pipeline" if (run / "pipeline").is_dir() else run
    if not (folder / "model_index.json").is_file():
        raise InputError("run", str(run), "holds no finished pipeline; train it to the end, or name another folder")
    check_links("run", run)
    set_threads(0)
    logging.set_verbosity(logging.CRITICAL)  # errors are one line, see below
    with damage("run", run):
        pipeline = MTDiffusionPipeline.from_pretrained(folder, trust_custom_modalities=trust)
    if lora is not None:
        pipeline.load_lora_weights(lora)
        pipeline.fuse_lora()
    if solver is not None:
        scheduler = pipeline.scheduler
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, solver=solver, solver_config=None)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def sample(
    pipeline: MTDiffusionPipeline,
    observe: list[str],
    num: int,
    seed: int,
    out: Path,
    each: Path | None,
    guidance: str | Callable[[Iterable[str]], dict[str, float]],
    settings: dict[str, Any],
) -> list[str]:
    """Draw samples, each with its own generator, and write one grid. All images of a sample stand side by side.

    Args:
        pipeline: the model and its solver.
        observe: `modality=value` texts, see each modality's `parse`.
        num: how many samples.
        seed: sample k depends on (seed, k) alone, not on ``num`` or the batch.
        out: file of the grid; a picture of the weights in a set is named after it.
        each: a folder for one file per modality and sample, or None.
        guidance: a number, `modality=number,…`, or a function of the conditions that gives {modality: scale}.
        settings: further arguments of the pipeline.

    Returns:
        Lines with the written files and with values that can be printed.

    Raises:
        InputError: before anything is drawn, for an input that does not fit and for a file that exists.
    """
    if each is not None and each.exists() and (not each.is_dir() or any(each.iterdir())):
        raise InputError("--save-each", str(each), "exists; choose another folder")
    _check_free(out)
    sized = pipeline.model.of_size(settings.get("height"), settings.get("width"))
    observed = {name: [raw] for name, raw in read_observed(sized, observe).items()}  # one value for all
    files = {name: out.with_stem(f"{out.stem}-{name}") for name in observed}  # of weights in sets
    for file in files.values():
        _check_free(file)
    conditions = set(observed) & set(pipeline.model.observable) - {pipeline.model.anchor}
    scales = read_guidance(guidance) if isinstance(guidance, str) else guidance(conditions)
    output = pipeline(num, observed, guidance_scale=scales, generator=generators(seed, num), **settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    sample_grid(pipeline.model, output.samples, max(1, round(num**0.5))).save(out)
    lines = [f"wrote {out}"]
    for name, weights in output.weights.items():  # one set was typed for all samples
        set_weights(output.samples[name][:1], weights[:1], files[name])
        lines.append(f"wrote {files[name]}, each image with its weight")
    for name, values in output.samples.items():
        if name not in output.weights and not isinstance(values[0], Image.Image):
            lines.append(f"{name}: {_as_text(values)}")
    return lines if each is None else [*lines, *_save_each(pipeline.model, output.samples, each)]


def prepare(pipeline: MTDiffusionPipeline, dtype: str, compiled: bool) -> None:
    """Choose the precision of the networks, and compile the backbone in place.

    Args:
        pipeline: changed in place.
        dtype: one of `PRECISIONS`; z_t, the solver and the heads' likelihoods stay in float32.
        compiled: whether to compile, which needs a C++ compiler and on a GPU Triton.
    """
    if dtype not in PRECISIONS:
        raise InputError("--dtype", dtype, f"choose one of {', '.join(PRECISIONS)}")
    pipeline.to(PRECISIONS[dtype])
    if compiled:
        pipeline.model.backbone.compile()


def read_observed(model: MTDiffusionModel, items: list[str]) -> dict[str, Any]:
    """`modality=value` texts as {modality: raw value}."""
    observed: dict[str, Any] = {}
    for item in items:
        name, separator, text = item.partition("=")
        if not separator:
            raise InputError("--observe", item, "write modality=value, for example label=3")
        if name not in model.names:
            raise InputError("--observe", item, f"no such modality; choose from {', '.join(model.names)}")
        if name in observed:
            raise InputError("--observe", item, f"{name} is observed twice; leave one out")
        with at(f"observed.{name}", join=None):
            observed[name] = model.modalities[name].parse(text)
    return observed


def read_guidance(text: str) -> float | dict[str, float]:
    """`2`, or `label=2,embedding=1.5` as {modality: scale}."""
    parts = text.split(",")
    if len(parts) == 1 and "=" not in text:
        return _scale(text)
    scales: dict[str, float] = {}
    for part in parts:
        name, separator, number = part.partition("=")
        if not separator or not name or name in scales:
            raise InputError("--guidance", text, "write one number, or modality=number, each modality once: label=2")
        scales[name] = _scale(number)
    return scales


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not (math.isfinite(scale) and scale >= 0):
        raise InputError("--guidance", text, "is no number ≥ 0; write 2, or label=2,embedding=1.5")
    return scale


def generators(seed: int, count: int) -> list[torch.Generator]:
    """One per sample; consecutive seeds, as torch's CPU generator keeps only 32 of a seed's bits."""
    first = fold(seed, 0, "sample") >> 1
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def _check_free(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise InputError("--out", str(out), "is no PNG; choose a name that ends in .png")
    if out.exists():
        raise InputError("--out", str(out), "exists; choose another file")


def _as_text(values: list[Any]) -> str:
    """What a terminal shows of samples: shape and range of maps and long vectors, the values of others."""
    if isinstance(values[0], np.ndarray) and values[0].size > _FEW:
        low, high = min(map(np.min, values)), max(map(np.max, values))
        return f"{len(values)} arrays of shape {values[0].shape}, {low:.4g} … {high:.4g} (see --save-each)"
    texts = [str(value) for value in values]
    text = "\n  ".join(["", *texts]) if any(" " in one for one in texts) else " ".join(texts)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " … (see --save-each)"


def _save_each(model: MTDiffusionModel, samples: dict[str, list[Any]], folder: Path) -> list[str]:
    """Write one file per modality and sample, `folder/modality/0000.*`, which `--observe` can read."""
    for name, values in samples.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index, value in enumerate(values):
            model.modalities[name].save(value, folder / name / f"{index:04d}")
    return [f"wrote {len(next(iter(samples.values())))} samples to {folder}"]
