"""`mmdiff evaluate`: every direction is scored, repeatably, and the file says how the numbers came about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from mmdiff.build import Experiment, build
from mmdiff.config import load_config
from mmdiff.data import Batch
from mmdiff.evaluation import evaluators
from mmdiff.evaluation.metrics import Judge
from mmdiff.pipeline import MTDiffusionPipeline


class Setup(NamedTuple):
    pipeline: MTDiffusionPipeline
    experiment: Experiment
    found: evaluators.Evaluation


@pytest.fixture(scope="module")
def setup(finished_run: Path) -> Setup:
    pipeline = MTDiffusionPipeline.from_pretrained(finished_run / "pipeline")
    overrides = ["evaluate={num_samples: 30, seeds: [0, 1]}", "sample.batch_size=16"]
    config = load_config(finished_run / "config.yaml", overrides)
    experiment = build(config)
    return Setup(pipeline, experiment, evaluate(pipeline, experiment))


def evaluate(pipeline: MTDiffusionPipeline, experiment: Experiment, **arguments: object) -> evaluators.Evaluation:
    return evaluators.evaluate(pipeline, experiment.config, experiment.train, experiment.validation, **arguments)


def test_every_direction_is_scored_for_every_seed(setup: Setup) -> None:
    directions = [(row.direction, row.setting.get("aggregate"), row.setting["seed"]) for row in setup.found.rows]
    assert len(directions) == len(set(directions)) == 10
    for seed in (0, 1):
        assert ("image → label", None, seed) in directions
        for aggregate in (True, False):
            assert ("joint", aggregate, seed) in directions and ("label → image", aggregate, seed) in directions
    for row in setup.found.rows:
        share = "accuracy" if row.direction == "image → label" else "agreement"
        low, high = row.scores[f"{share}, 95 %"]
        assert 0 <= low <= row.scores[share] <= high <= 1
        if share == "agreement":
            assert sum(row.scores["class shares"]) == pytest.approx(1.0)
            assert row.scores["Fréchet distance"] > row.scores["floor"]  # twelve steps make no digits


def test_the_same_settings_give_the_same_numbers_beside_others(setup: Setup) -> None:
    rows = evaluate(setup.pipeline, setup.experiment, steps=(1, 2)).rows
    scores = {count: [row.scores for row in rows if row.setting["steps"] == count] for count in (1, 2)}
    assert len(rows) == 2 * len(scores[2])
    assert scores[2] == [row.scores for row in setup.found.rows]
    assert scores[1][0] != scores[2][0]  # another number of steps
    assert scores[2][0] != scores[2][5]  # another seed


def test_the_scores_are_those_of_the_samples(setup: Setup) -> None:
    """The direction label → image by hand: the same generator, a judge of training pixels."""
    given = torch.arange(30) % 10
    arguments = {"observed": {"label": given}, "aggregate": True, "num_inference_steps": 2}
    images = evaluators.draw(setup.pipeline, 30, 16, 0, **arguments)["image"]
    real = setup.experiment.train.all().values
    judge = Judge(real["image"].numpy(), real["label"].numpy())
    row = next(r for r in setup.found.rows if r.direction == "label → image" and r.setting["aggregate"])
    assert row.setting["seed"] == 0
    assert row.scores["agreement"] == pytest.approx((judge(images.numpy()) == given.numpy()).mean())
    assert row.scores["std over samples"] == pytest.approx(float(images.numpy().std(axis=0).mean()), rel=1e-5)


def test_rows_with_a_missing_value_take_no_part(setup: Setup) -> None:
    """What stands in for a missing value is no truth: neither for the judge nor for the read-out."""
    rows = setup.experiment.validation.all()
    lacking = torch.arange(len(rows.values["label"])) % 3 == 0
    damaged = {
        "image": torch.where(lacking[:, None, None, None], torch.zeros(()), rows.values["image"]),
        "label": torch.where(lacking, 0, rows.values["label"]),
    }
    some = Batch(damaged, {"image": ~lacking, "label": torch.ones_like(lacking)})
    kept = Batch(
        {name: value[~lacking] for name, value in rows.values.items()}, dict.fromkeys(damaged, ~lacking[~lacking])
    )
    modality = setup.pipeline.model.modalities["label"]
    one, other = (evaluators.LabelEvaluator("label", modality, "image", b, b) for b in (some, kept))
    assert torch.equal(one.held_out_labels, other.held_out_labels) and len(one.held_out) == int((~lacking).sum())
    assert one.judge_accuracy == other.judge_accuracy
    assert np.array_equal(one.judge(rows.values["image"].numpy()), other.judge(rows.values["image"].numpy()))


def test_the_judge_is_good_on_held_out_digits(setup: Setup) -> None:
    assert setup.found.manifest["label judge accuracy"] > 0.9
    held_out = setup.experiment.validation.all().values
    assert np.bincount(held_out["label"].numpy()).min() > 20


def test_the_manifest_and_the_table_say_how(setup: Setup) -> None:
    expected = {"data": "digits", "training rows": 1498, "held-out rows": 299, "samples": 30, "seeds": [0, 1]}
    assert expected.items() <= setup.found.manifest.items()
    assert setup.found.manifest["solver"] == setup.experiment.config.scheduler.solver
    text = evaluators.table(setup.found)
    assert text.count("2 seeds)") == 5 and "joint  (aggregate=True, steps=2; 2 seeds)" in text


def test_saving_never_overwrites(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    for solver in ("first", "second", "third"):
        setup.found.manifest["solver"] = solver
        evaluators.save(setup.found, path)
    setup.found.manifest["solver"] = setup.experiment.config.scheduler.solver
    names = ("evaluation-1.json", "evaluation-2.json", path.name)
    saved = [json.loads((tmp_path / name).read_text()) for name in names]
    assert [entry["manifest"]["solver"] for entry in saved] == ["first", "second", "third"]
    assert saved[0]["rows"] == setup.found.to_json()["rows"]
