"""What fails after a training fails before it; and nothing that is tried before moves the training by a bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdiff.build import build
from mmdiff.config import Config
from mmdiff.errors import InputError
from mmdiff.training import loop, train
from mmdiff.training.launcher import obey_launcher
from mmdiff.training.preflight import preflight
from mmdiff.training.process import make_accelerator
from mmdiff.training.trainer import Trainer

Configure = Callable[..., Config]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ("sample.steps=51", "sample.steps"),
        ("sample.guidance.label=2 sample.guidance.lable=2", "sample.guidance.lable"),
        ("sample.guidance.image=2", "sample.guidance.image"),
        ("sample.feedback=mode", "sample.feedback"),
        ("evaluate.judges.label=nowhere", "evaluate.judges.label"),
        ("evaluate.judges.image=nowhere", "evaluate.judges.image"),
        ("evaluate.features=nowhere.pth", "evaluate.features"),
        ("evaluate.lpips.backbone=nowhere.pth", "evaluate.lpips.backbone"),
        ("evaluate.lpips.heads=nowhere.pth evaluate.lpips.backbone=/dev/null", "evaluate.lpips.backbone"),
        ("evaluate.zero_shot.model=ViT", "evaluate.zero_shot.model"),
        ("evaluate.zero_shot.template=photo", "evaluate.zero_shot.template"),
        ("evaluate.zero_shot.names=[a,b]", "evaluate.zero_shot.names"),
        ("evaluate.masking.a.pattern=sqares", "evaluate.masking.a.pattern"),
        ("evaluate.at_end=true evaluate.max_rows=2", "data"),
        ("scheduler.clip_sample_range=0.5", "scheduler.clip_sample_range"),
        ("modalities.image.scale=1000", "modalities.image.scale"),
        ("states.anchor_observed=1 modalities.label.loss_weight=0", "states.anchor_observed"),
        ("states.anchor_hidden=1 modalities.label.loss_weight=0", "states.anchor_hidden"),
        (
            "scheduler.timestep_spacing=leading scheduler.solver_config.steps_offset=60",
            "scheduler.solver_config.steps_offset",
        ),
    ],
)
def test_what_fails_late_is_told_before_step_1(configure: Configure, tmp_path: Path, overrides: str, key: str) -> None:
    with pytest.raises(InputError) as caught:
        train(configure(*overrides.split()), progress=False)
    assert caught.value.key == key, caught.value
    assert not (tmp_path / "run").exists()


def test_nothing_moves(configure: Configure) -> None:
    config = configure("backbone.dropout=0.1", "evaluate.at_end=true")
    experiment = build(config)
    trainer = Trainer(experiment, make_accelerator(config.train))
    torch.manual_seed(3)
    before = {name: value.clone() for name, value in trainer.bare.state_dict().items()}
    averages = {name: value.clone() for name, value in trainer.ema.averages.items()}
    preflight(experiment, trainer)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))
    assert all(torch.equal(value, before[name]) for name, value in trainer.bare.state_dict().items())
    assert all(torch.equal(value, averages[name]) for name, value in trainer.ema.averages.items())
    assert trainer.bare.training and all(module.training for module in trainer.bare.model.backbone.modules())


# -------------------------------------------------------------------------------------------------- launcher's flags


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`launched(MIXED_PRECISION="bf16")`: the environment that `accelerate launch` makes."""

    def start(**environment: str) -> None:
        usual = {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "GRADIENT_ACCUMULATION_STEPS": "1"}
        for name, value in (usual | environment).items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)

    return start


def test_the_launcher_is_obeyed_where_the_config_says_nothing(configure: Configure, launched: Callable) -> None:
    launched()
    assert obey_launcher(configure("train.mixed_precision=bf16")).train.mixed_precision == "bf16"
    launched(MIXED_PRECISION="bf16", GRADIENT_ACCUMULATION_STEPS="2")
    found = obey_launcher(configure())
    assert (found.train.mixed_precision, found.train.accumulate) == ("bf16", 2)
    assert obey_launcher(configure("train.mixed_precision=bf16", "train.accumulate=2")) == found
    assert make_accelerator(found.train).gradient_accumulation_steps == 1  # the loss is not divided twice


@pytest.mark.parametrize(
    ("environment", "override", "start"),
    [
        ({"MIXED_PRECISION": "bf16"}, "train.mixed_precision=no", "train.mixed_precision = 'no': but `acc"),
        ({"MIXED_PRECISION": "fp8"}, "", "accelerate launch: mixed_precision = 'fp8': "),
        ({"GRADIENT_ACCUMULATION_STEPS": "4"}, "train.accumulate=2", "train.accumulate = 2: but `accelerate"),
        ({"GRADIENT_ACCUMULATION_STEPS": "auto"}, "", "accelerate launch --gradient_accumulation_steps = 'auto'"),
        ({"GRADIENT_ACCUMULATION_STEPS": "-1"}, "", "accelerate launch: accumulate = -1"),
        ({"DYNAMO_BACKEND": "INDUCTOR"}, "", "accelerate launch --dynamo_backend = 'INDUCTOR'"),
        ({"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "3"}, "", "accelerate launch --zero_stage = '3'"),
        ({"USE_FSDP": "true"}, "train.sharding=none", "train.sharding = 'none': but `accelerate launch`"),
        ({"USE_MEGATRON_LM": "true"}, "", "accelerate launch --use_megatron_lm = 'true'"),
    ],
)
def test_the_launcher_is_refused(
    configure: Configure, launched: Callable, environment: dict[str, str], override: str, start: str
) -> None:
    launched(**environment)
    with pytest.raises(InputError) as caught:
        train(configure(*override.split()), progress=False)
    assert str(caught.value).startswith(start)


def test_a_resumed_run_under_the_same_flags_is_the_whole_run(
    configure: Configure, launched: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(MIXED_PRECISION="bf16", GRADIENT_ACCUMULATION_STEPS="2")
    whole = train(configure(f"output={tmp_path / 'whole'}"), progress=False)
    overrides = (f"output={tmp_path / 'parts'}", "train.checkpoint_every=3", "train.resume=auto")
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopSignal, "agreed", lambda self, accelerator, due: due)  # as after a SIGTERM
        train(configure(*overrides), progress=False)
    assert len((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()) == 1
    parts = train(configure(*overrides), progress=False)
    weights = [load_file(next((run / "pipeline" / "model").glob("*.safetensors"))) for run in (whole, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    last = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"] for run in (whole, parts)]
    assert last[0] == last[1]
