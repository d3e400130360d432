"""A learning-rate sweep: its losses are those of the averaged weights on held-out rows, its choice the smallest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmdiff.benchmarks.reconstruction.sweep import DRAWS, ROWS, over_steps, short_steps, swept, validation_loss
from mmdiff.build import build
from mmdiff.config import Config, load_config
from mmdiff.errors import InputError
from mmdiff.model import MTDiffusionModel
from mmdiff.objective import BatchPosition

Configure = Callable[..., Config]


def test_the_validation_loss_is_that_of_the_pipeline(finished_run: Path) -> None:
    experiment = build(load_config(finished_run / "config.yaml"))
    saved = MTDiffusionModel.from_pretrained(finished_run / "pipeline" / "model")
    experiment.model.load_state_dict(saved.state_dict())
    batch = experiment.validation.all(ROWS)
    count = len(batch.present["image"])
    with torch.no_grad():
        wheres = (BatchPosition(draw, torch.arange(count), count) for draw in range(DRAWS))
        losses = [float(experiment.objective.eval()(batch, where).loss) for where in wheres]
    assert validation_loss(finished_run) == pytest.approx(sum(losses) / DRAWS, rel=1e-5)


def test_a_sweep_takes_the_best_and_is_not_repeated(configure: Configure, tmp_path: Path) -> None:
    config = configure("train.steps=8", "train.warmup=0")
    run = swept(config, (1e-4, 1.0), tmp_path / "out", progress=False)
    record = json.loads((run / "sweep.json").read_text())
    losses = {float(rate): loss for rate, loss in record["validation loss by learning rate"].items()}
    assert record["steps"] == 2 and record["best"] == min(losses, key=losses.__getitem__) == 1e-3  # 1e-7 learns nothing
    assert load_config(run / "config.yaml").train.learning_rate == record["chosen"] == over_steps(1e-3, 2, 8) == 6.42e-4
    for rate, loss in losses.items():
        short = tmp_path / "out" / "sweeps" / "tiny" / f"rate-{rate:g}"
        assert load_config(short / "config.yaml").train.learning_rate == rate
        assert validation_loss(short) == pytest.approx(loss) and (short / "curves.png").is_file()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert swept(config, (1e-4, 1.0), tmp_path / "out", progress=False) == run
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")} == files


def test_short_runs_are_a_quarter_or_125_steps() -> None:
    assert [short_steps(steps) for steps in (1, 8, 500, 2000)] == [1, 2, 125, 125]


def test_the_rate_falls_with_the_horizon() -> None:
    assert over_steps(3e-4, 125, 125) == 3e-4
    assert over_steps(5e-3, 125, 2000) == pytest.approx(5e-3 * 16**-0.32, rel=5e-3)
    once, twice = over_steps(1.0, 125, 2000), over_steps(over_steps(1.0, 125, 500), 500, 2000)
    assert once == pytest.approx(twice, rel=5e-3)  # by one step or by two


def test_one_factor_is_no_sweep(configure: Configure, tmp_path: Path) -> None:
    run = swept(configure("train.steps=2"), (0.5,), tmp_path, progress=False)
    assert run == tmp_path / "runs" / "tiny" and not (tmp_path / "sweeps").exists()
    assert load_config(run / "config.yaml").train.learning_rate == 5e-4
    for bad in ((), (1.0, 0.0)):
        with pytest.raises(InputError, match="needs factors of the learning rate"):
            swept(configure(), bad, tmp_path / "bad")
