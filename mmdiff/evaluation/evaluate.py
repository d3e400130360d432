"""`mmdiff evaluate`: a run is opened, every direction is scored, and the results are written to its folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff.build import build_table, open_rows, state_probabilities
from mmdiff.config import Config, load_config
from mmdiff.data import Table
from mmdiff.errors import InputError
from mmdiff.evaluation import report
from mmdiff.evaluation.elbo import elbo_rows
from mmdiff.evaluation.evaluator import Evaluator
from mmdiff.evaluation.report import Evaluation, manifest, settings_hash
from mmdiff.grids import table as picture
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.runs import load
from mmdiff.sampling.conditioning import feedback_for
from mmdiff.training.averages import read_average
from mmdiff.trust import check_links, refuse_custom


@dataclass(frozen=True)
class Request:
    """What is evaluated; what is not named here is an argument of `evaluate`.

    Attributes:
        run: the run folder.
        overrides: settings of it as key=value.
        solver: in place of the run's.
        pipeline: a folder that `mmdiff ema` wrote, in place of the run's own pipeline.
        trust: whether the run may name code and contact the hub.
        trust_judges: whether runs that serve as judges may.
    """

    run: Path
    overrides: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    solver: str | None = None
    feedback: str | None = None
    conditioning: tuple[str, ...] = ()
    subsets: bool = False
    bound: bool = False
    trust: bool = False
    trust_judges: bool = False
    pipeline: Path | None = None


def run(request: Request) -> str:
    """Evaluate a run, write evaluation.json and pictures; the table and what was written.

    Raises:
        InputError: the run or a setting does not fit.
    """
    folder, file = request.run, request.run / "evaluation.json"
    check_links("run", folder)
    config = load_config(folder / "config.yaml", list(request.overrides))
    if not request.trust:
        refuse_custom(config.model_dump()["modalities"])
    report.read(file)  # a broken one is named before the work
    home = request.pipeline or folder / "pipeline"
    pipeline = load(request.pipeline or folder, request.solver, request.trust)
    if set(pipeline.model.names) != set(config.modalities):
        raise InputError("--pipeline", str(home), f"has other modalities than {folder}; name a pipeline of this run")
    train, held_out = (build_table(config, pipeline.model, rows) for rows in open_rows(config, hub=request.trust))
    result = evaluate(
        pipeline,
        config,
        train,
        held_out,
        request.steps,
        request.feedback,
        request.trust_judges,
        request.conditioning,
        request.subsets,
        request.bound,
        read_average(home),
    )
    report.save(result, file)
    pictures = {folder / "samples" / f"evaluation-{name}.png": columns for name, columns in result.pictures.items()}
    for path, columns in pictures.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(columns).save(path)
    return "\n".join([report.table(result), *(f"wrote {path}" for path in pictures)])


def evaluate(
    pipeline: MTDiffusionPipeline,
    config: Config,
    train: Table,
    validation: Table,
    steps: tuple[int, ...] | None = None,
    feedback: str | None = None,
    trust_custom_modalities: bool = False,
    conditioning: Iterable[str] = (),
    subsets: bool = False,
    bound: bool = False,
    weights: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Score every direction: joint, each modality → anchor, anchor → each modality.

    Args:
        pipeline: the model; its scheduler's solver is used.
        config: the run's; `evaluate.*` and `sample.*` count.
        train, validation: real rows; judges and features are fitted on training rows only.
        steps: numbers of solver steps to compare; default `sample.steps`.
        feedback: see the pipeline; default `sample.feedback`.
        trust_custom_modalities: of runs that serve as judges.
        conditioning: ways to compare, such as "concatenation+head-guidance", see the pipeline; default: as
            trained, with and without aggregating.
        subsets: score every subset of observed modalities instead, see `Evaluator.subsets`.
        bound: the bound on the log-likelihood instead, see `mmdiff.evaluation.elbo`.
        weights: which average of a training's weights the model has; stands in the manifest.
    """
    pipeline.set_progress_bar_config(disable=True)
    average = {"weights": dict(weights)} if weights else {}
    if bound:
        facts = average | {"settings": settings_hash(config, "elbo", average, dict(pipeline.scheduler.config))}
        rows = elbo_rows(pipeline, config, validation)
        return Evaluation(manifest(pipeline, config, train, validation) | facts, rows)
    evaluator = Evaluator(pipeline, config, train, validation, trust_custom_modalities, conditioning)
    reads = state_probabilities(config, config.anchor).observed > 0 and not subsets
    rows = [*(evaluator.reads() if reads else ()), *(() if subsets else evaluator.baselines())]
    draws = evaluator.subsets if subsets else evaluator.samples
    for count in steps or (config.sample.steps,):
        for seed in config.evaluate.seeds:
            for row in draws(count, seed, feedback or config.sample.feedback):
                row.setting |= {"steps": count, "seed": seed}
                rows.append(row)
    known = config, steps, feedback, evaluator.conditioning, subsets, average, dict(pipeline.scheduler.config)
    feedback = feedback_for(feedback or config.sample.feedback, pipeline.scheduler.is_stochastic)
    facts = evaluator.facts | average | {"feedback": feedback, "settings": settings_hash(*known)}
    return Evaluation(manifest(pipeline, config, train, validation) | facts, rows, evaluator.pictures)
