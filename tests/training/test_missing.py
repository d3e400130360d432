"""Any modality may be missing in any rows: training goes on, and what is not there has no effect."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from networks import alive
from omegaconf import OmegaConf
from PIL import Image as PILImage

from mmdiff.build import Experiment, build
from mmdiff.config import Config, load_config
from mmdiff.data import Batch
from mmdiff.objective import BatchPosition
from mmdiff.training import train

Configure = Callable[..., Config]
COUNT, SIZE = 24, 16
NAMES = ("depth", "embedding", "image", "label", "mask", "masked")


def columns(seed: int = 0) -> dict[str, list[Any]]:
    numbers = np.random.default_rng(seed)
    pixels = numbers.integers(256, size=(COUNT, SIZE, SIZE), dtype=np.uint8)
    ids = numbers.integers(3, size=(COUNT, SIZE, SIZE), dtype=np.uint8)
    return {
        "image": [PILImage.fromarray(one) for one in pixels],
        "mask": [PILImage.fromarray(one) for one in ids],
        "label": [k % 3 for k in range(COUNT)],
        "embedding": list(numbers.normal(size=(COUNT, 6)).astype(np.float32)),
        "depth": list(numbers.normal(5.0, 2.0, size=(COUNT, SIZE, SIZE)).astype(np.float32)),
    }


@pytest.fixture
def configure(tiny: dict[str, Any], tmp_path: Path) -> Configure:
    """Every kind of modality, a quarter of the values of every column None at random."""
    values, gaps = columns(), np.random.default_rng(1)
    for column in values.values():
        for row in np.flatnonzero(gaps.random(COUNT) < 0.25):
            column[row] = None
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "mask": datasets.Image(),
            "label": datasets.Value("int64"),
            "embedding": datasets.List(datasets.Value("float32")),
            "depth": datasets.Array2D((SIZE, SIZE), "float32"),
        }
    )
    datasets.Dataset.from_dict(values, features=features).to_parquet(tmp_path / "rows.parquet")
    tiny["data"] = {
        "source": str(tmp_path / "rows.parquet"),
        "holdout": 4,
        "masking": {"masked": {"pattern": "box", "ratio": 0.4}},
    }
    tiny["modalities"] = {
        "image": {"kind": "image"},
        "label": {"kind": "label"},
        "mask": {"kind": "mask", "pattern_size": 2},
        "masked": {"kind": "masked_image"},
        "embedding": {"kind": "embedding"},
        "depth": {"kind": "dense"},
    }
    tiny["train"] |= {"steps": 2, "log_every": 1}
    tiny["states"] = {"anchor_hidden": 0.2}
    OmegaConf.save(OmegaConf.create(tiny), tmp_path / "missing.yaml")
    return lambda *overrides: load_config(tmp_path / "missing.yaml", list(overrides))


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_finite(lines: list[dict[str, float]]) -> None:
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert {f"l2/{name}" for name in NAMES if name != "image"} < set(line)
        assert all(map(math.isfinite, line.values())), line


def test_values_that_are_missing_here_and_there_are_no_problem(configure: Configure) -> None:
    present = build(configure()).train.all().present
    assert all(0 < int(mask.sum()) < len(mask) for mask in present.values())
    lines = metrics(train(configure()))
    assert_finite(lines)
    assert all(line[f"l2/{name}"] != 0 for line in lines for name in NAMES if name != "image")


@pytest.mark.parametrize("name", NAMES)
def test_a_column_may_be_missing_in_a_whole_batch(configure: Configure, name: str) -> None:
    lines = metrics(train(configure(f"data.missing.{name}=1.0")))
    assert_finite(lines)
    terms = ("l1", "l3", "l2/masked") if name == "image" else (f"l2/{name}",)  # the anchor's are what rests on it
    assert all(line[term] == 0 for line in lines for term in terms)
    assert all(line["grad_norm"] > 0 for line in lines)


def test_everything_may_be_missing(configure: Configure) -> None:
    lines = metrics(train(configure(*(f"data.missing.{name}=1.0" for name in NAMES))))
    assert_finite(lines)
    assert all(line[term] == 0 for line in lines for term in line if term.startswith(("l1", "l2", "l3")))


@pytest.fixture
def experiment(configure: Configure) -> Experiment:
    """With random numbers where a fresh network has zeros."""
    built = build(configure())
    torch.manual_seed(0)
    alive(built.model)
    return built


def terms_and_gradients(experiment: Experiment, batch: Batch) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    objective = experiment.objective
    objective.zero_grad()
    output = objective(batch, BatchPosition(3, torch.arange(len(batch.present["image"])), len(batch.present["image"])))
    output.loss.backward()
    terms = {name: float(term) for name, term in output.terms.items()}
    return terms, {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_whatever_lies_where_a_value_is_missing_has_no_effect(experiment: Experiment, name: str) -> None:
    """NaN and ids of no class too, in the loss and in every gradient."""
    batch = experiment.train.all()
    assert not batch.present[name].all()
    before, gradients = terms_and_gradients(experiment, batch)
    value = batch.values[name].clone()
    value[~batch.present[name]] = math.nan if value.is_floating_point() else 10**6
    after, again = terms_and_gradients(experiment, Batch({**batch.values, name: value}, batch.present))
    assert after == before and all(map(math.isfinite, after.values()))
    assert gradients.keys() == again.keys()
    assert all(torch.equal(gradients[key], again[key]) and again[key].isfinite().all() for key in gradients)


def test_every_parameter_takes_part_whatever_is_missing(experiment: Experiment) -> None:
    """Data parallelism waits for the gradient of each: none may drop out where its modality is missing."""
    batch = experiment.train.all()
    trained = {name for name, p in experiment.objective.named_parameters() if p.requires_grad}
    for name in NAMES:
        nowhere = torch.zeros_like(batch.present[name])
        _, gradients = terms_and_gradients(experiment, Batch(batch.values, {**batch.present, name: nowhere}))
        assert set(gradients) == trained
