"""A model on the flow-matching path, from the config to its samples, by `scheduler.kind` alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import alive

import mmdiff
from mmdiff.build import build_stand_in
from mmdiff.config import Config, load_config
from mmdiff.data import Batch
from mmdiff.objective import BatchPosition
from mmdiff.training import train

FLOW = ["scheduler.kind=flow_match", "scheduler.num_train_timesteps=50", "modalities.label.num_classes=10"]
FLOW += ["modalities.image={kind: image, channels: 1, size: [16, 16]}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from omegaconf import OmegaConf

    folder = tmp_path_factory.mktemp("flow")
    tree = {
        "name": "flow",
        "output": str(folder / "run"),
        "data": {"source": "digits", "cache_mib": 0},
        "modalities": {"image": {"kind": "image"}, "label": {"kind": "label", "weight": {"schedule": "learned"}}},
        "backbone": {"block_out_channels": [8, 16], "layers_per_block": 1, "patch_size": 2, "norm_num_groups": 4},
        "scheduler": {"kind": "flow_match", "num_train_timesteps": 50},
        "train": {"steps": 4, "batch_size": 12, "warmup": 2, "threads": 1},
        "sample": {"steps": 2},
        "evaluate": {"at_end": False},
    }
    OmegaConf.save(OmegaConf.create(tree), folder / "flow.yaml")
    return train(load_config(folder / "flow.yaml", ["backbone.attention_head_dim=8"]))


def test_the_pipeline_of_a_run_is_saved_and_loaded_with_its_scheduler(run: Path, tmp_path: Path) -> None:
    index = json.loads((run / "pipeline/model_index.json").read_text())
    assert index["scheduler"] == ["mmdiff.schedulers.mt_flow_match", "MTFlowMatchScheduler"]
    pipe = mmdiff.MTDiffusionPipeline.from_pretrained(run / "pipeline")
    assert isinstance(pipe.scheduler, mmdiff.MTFlowMatchScheduler)
    assert pipe.scheduler.config.weights["label"]["schedule"] == "learned"
    pipe.save_pretrained(tmp_path / "again")
    again = mmdiff.MTDiffusionPipeline.from_pretrained(tmp_path / "again")
    for observed in ({}, {"label": torch.tensor([3, 1])}):
        samples = []
        for one in (pipe, again):
            one.set_progress_bar_config(disable=True)
            settings = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
            samples.append(one(batch_size=2, observed=observed, **settings).samples)
        assert torch.equal(samples[0]["image"], samples[1]["image"]) and samples[0]["image"].isfinite().all()
        assert torch.equal(samples[0]["label"], samples[1]["label"])
    read = pipe(observed={"image": samples[0]["image"]}, output_type="pt").samples["label"]
    assert read.shape == (2,)


def test_the_command_line_samples_with_another_solver_of_the_path(cli: Callable, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    arguments = ["sample", run, "--num", 2, "--steps", 2, "--out", out]
    assert cli(*arguments, "--solver", "FlowMatchEulerDiscreteScheduler").code == 0
    assert out.is_file()
    assert "variance-preserving path" in cli(*arguments, "--solver", "DDIMScheduler").complaint
    shown = cli("show", run / "config.yaml").out
    assert "kind: flow_match" in shown and "logit_std: 1.0" in shown and "at T 0" in shown


@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
def test_the_objective_is_the_flow_matching_loss(configure: Callable[..., Config], prediction_type: str) -> None:
    """Without auxiliary states: the mean of ‖target − network((1 − σ) z_0 + σ ε, σT)‖² at stratified logit-normal σ."""
    states = "states={distribution: heads, anchor_observed: 0}"
    experiment = build_stand_in(configure(*FLOW, states, f"scheduler.prediction_type={prediction_type}"))
    objective, model = experiment.objective, experiment.model
    alive(model)
    where, present = BatchPosition(0, torch.arange(8), 8), torch.ones(8, dtype=torch.bool)
    values = {n: m.examples(8, torch.Generator().manual_seed(0)) for n, m in model.modalities.items()}
    batch = Batch(values, dict.fromkeys(values, present))
    timesteps = objective.draw_timesteps(where, present)
    strata = torch.distributions.Normal(0.0, 1.0).cdf(torch.logit(timesteps.double() / 50))
    assert (strata * 8).floor().sort().values.tolist() == list(range(8))
    seen = {}
    model.register_forward_pre_hook(lambda _, inputs: seen.update(z_t=inputs[0], times=inputs[1], rest=inputs[2]))
    terms = objective(batch, where).terms
    assert torch.equal(seen["times"], timesteps)
    z_0, sigma = batch.values["image"], timesteps[:, None, None, None] / 50
    noise = (seen["z_t"] - (1 - sigma) * z_0) / sigma
    target = {"velocity": noise - z_0, "sample": z_0}[prediction_type]
    error = (model(seen["z_t"], timesteps, seen["rest"]).prediction - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(terms["l1"], (error * (timesteps > 1)).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["l3"], (error * (timesteps <= 1)).mean(), rtol=1e-3, atol=1e-5)
    assert float(terms["l0"]) == 0.0  # z_T is N(0, I), whatever z_0 and the encodings
    hidden = objective.draw_timesteps(where, ~present)
    assert hidden.tolist() == [50.0] * 8
