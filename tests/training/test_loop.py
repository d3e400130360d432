"""What a run leaves behind, what it refuses, and the laws of its learning rate and averages."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from mmdiff.config import Config, TrainConfig, load_config
from mmdiff.errors import InputError, TrainingError
from mmdiff.states import DISTRIBUTIONS
from mmdiff.training import train
from mmdiff.training.checkpoint import seal
from mmdiff.training.ema import Ema
from mmdiff.training.learning_rate import learning_rate
from mmdiff.training.tracking import MACHINE

Configure = Callable[..., Config]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------- what it leaves


def test_the_run_folder(finished_run: Path) -> None:
    assert names(finished_run) == ["checkpoints", "config.yaml", "curves.png", "metrics.jsonl", "pipeline", "samples"]
    assert names(finished_run / "checkpoints") == ["step-12", "step-8"]  # of 4, 8 and 12 two are kept
    assert names(finished_run / "samples") == ["step-12.png", "step-6.png"]
    assert names(finished_run / "pipeline") == ["average.json", "model", "model_index.json", "scheduler"]
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]
    terms = {"l0", "l1", "l2/label", "l3", "loss", "grad_norm", "learning_rate", "step", *MACHINE}
    assert all(set(line) == terms and all(map(math.isfinite, line.values())) for line in lines)
    total = lines[0]["l0"] + lines[0]["l1"] + lines[0]["l3"] + 0.1 * lines[0]["l2/label"]
    assert lines[0]["loss"] == pytest.approx(total, rel=1e-5)


def test_the_config_in_the_folder_is_resolved(finished_run: Path) -> None:
    config = load_config(finished_run / "config.yaml")
    assert config.modalities["image"].settings() == {"channels": 1, "size": [16, 16]}
    assert config.modalities["label"].settings() == {"num_classes": 10, "names": list("0123456789"), "unknown": -1}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_distribution_of_states_ends_with_a_pipeline_and_a_grid(configure: Configure, distribution: str) -> None:
    """Sampling is steered by what training showed; guidance where there is nothing to guide is off."""
    folder = train(configure("train.steps=2", f"states.distribution={distribution}", "sample.guidance_scale=2"))
    assert names(folder / "samples") == ["step-2.png"]
    assert (folder / "pipeline" / "model_index.json").is_file()


def test_the_grid_has_a_row_per_class(finished_run: Path) -> None:
    with Image.open(finished_run / "samples" / "step-12.png") as grid:
        width, height = grid.size  # 16 pixels three times enlarged, gaps of 2; the classes' names stand to the left
        assert height == 10 * (48 + 2) + 2 < width < height + 50
        low, high = grid.convert("L").getextrema()
        assert low < 64 and high > 192


def test_nothing_in_the_folder_is_a_pickle(finished_run: Path) -> None:
    found = {path.suffix for path in finished_run.rglob("*") if path.is_file()}
    assert found == {".json", ".jsonl", ".yaml", ".safetensors", ".png"}


def test_the_pipeline_holds_the_averages(finished_run: Path) -> None:
    averages = load_file(finished_run / "checkpoints" / "step-12" / "ema.safetensors")
    weights = load_file(finished_run / "checkpoints" / "step-12" / "weights.safetensors")
    saved = load_file(finished_run / "pipeline" / "model" / "diffusion_pytorch_model.safetensors")
    assert len(saved) > 10
    assert all(torch.equal(value, averages[f"model.{name}"]) for name, value in saved.items())
    assert not torch.equal(saved["modalities.label.table"], weights["model.modalities.label.table"])


# --------------------------------------------------------------------------------------------------- what it refuses


def test_a_folder_that_exists_is_left_as_it_is(finished_run: Path, tmp_path: Path) -> None:
    before = contents(finished_run)
    with pytest.raises(InputError, match=r"^output = .*: exists; choose another output=…, or continue it with"):
        train(load_config(finished_run / "config.yaml"))
    assert contents(finished_run) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is no run folder"):
        train(load_config(finished_run / "config.yaml", [f"output={tmp_path / 'notes'}", "train.resume=auto"]))
    assert names(tmp_path / "notes") == ["mine.txt"]


@pytest.mark.parametrize("change", ["train.learning_rate=0.5", "train.seed=9", "modalities.label.weight.scale=0.5"])
def test_a_changed_config_is_not_resumed(run_copy: Path, change: str) -> None:
    before = contents(run_copy)
    key, _, value = change.partition("=")
    with pytest.raises(InputError, match=rf"^{key} = '?{value}'?: the run in .* was started with"):
        train(load_config(run_copy / "config.yaml", [f"output={run_copy}", "train.resume=auto", change]))
    assert contents(run_copy) == before


def reseal(checkpoint: Path) -> None:
    """As if it had been written so: a file that does not have its hash is damaged."""
    state = json.loads((checkpoint / "state.json").read_text())
    seal(checkpoint, {key: value for key, value in state.items() if key not in ("files", "sha256")})


@pytest.mark.parametrize("change", ["another shape", "one too few", "one too many"])
def test_a_checkpoint_that_does_not_fit_is_refused(run_copy: Path, change: str) -> None:
    path = run_copy / "checkpoints" / "step-12" / "weights.safetensors"
    weights, name = load_file(path), "model.modalities.label.table"
    if change == "another shape":
        weights[name] = weights[name][:9].contiguous()
    elif change == "one too few":
        del weights[name]
    else:
        name = "model.modalities.depth.table"
        weights[name] = torch.zeros(2)
    save_file(weights, path)
    reseal(path.parent)
    with pytest.raises(InputError, match=rf"^train.resume = .*step-12': does not match the config: {name} is "):
        train(load_config(run_copy / "config.yaml", [f"output={run_copy}", "train.resume=auto"]))


def test_a_loss_that_is_not_finite_stops_the_run(configure: Configure, tmp_path: Path) -> None:
    options = ["train.learning_rate=1e9", "train.checkpoint_every=3", "train.warmup=0", "train.max_grad_norm=1e9"]
    with pytest.raises(TrainingError) as caught:
        train(configure(*options))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("step 2: ")  # the first update threw the weights out
    assert any(f": {term} is " in message for term in ("loss", "l1", "grad_norm"))
    assert f"at learning rate {learning_rate(1, configure(*options).train):.3g};" in message
    assert names(tmp_path / "run" / "checkpoints") == [] and not (tmp_path / "run" / "pipeline").exists()


def test_training_gives_ctrl_c_back(configure: Configure) -> None:
    """In a notebook the process goes on after training, and is interrupted by the same signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    train(configure("train.steps=1"))
    assert {number: signal.getsignal(number) for number in before} == before


# -------------------------------------------------------------------------------------------------------------- laws


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    config = TrainConfig(steps=110, warmup=10, learning_rate=2.0)
    rates = [learning_rate(step, config) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * k / 100) for k in range(100)])
    assert rates[60] == pytest.approx(1.0)
    assert learning_rate(0, TrainConfig(steps=3, warmup=0, learning_rate=2.0)) == 2.0
    assert learning_rate(2, TrainConfig(steps=3, warmup=50, learning_rate=1.0)) == pytest.approx(0.06)


def test_the_averages_equal_a_loop_in_float64() -> None:
    module = nn.Linear(3, 2)
    ema = Ema(module, decay=0.9)
    expected = {name: p.detach().double() for name, p in module.named_parameters()}
    for n in range(200):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn(p.shape))
        ema.update(n)
        decay = min(0.9, (1 + n) / (10 + n))  # reaches 0.9 at n = 80
        live = {name: p.detach().double() for name, p in module.named_parameters()}
        expected = {name: decay * expected[name] + (1 - decay) * live[name] for name in live}
    for name, average in ema.averages.items():
        assert torch.allclose(average.double(), expected[name], rtol=0, atol=1e-5)


def test_averages_are_swapped_in_and_out_again() -> None:
    module = nn.Linear(3, 2)
    ema = Ema(module, decay=0.9)
    with torch.no_grad():
        module.weight.add_(1.0)
    ema.update(0)
    live, average = module.weight.detach().clone(), ema.averages["weight"].clone()
    assert not torch.equal(live, average)
    with pytest.raises(KeyError), ema.swapped_in():
        assert torch.equal(module.weight, average)
        raise KeyError  # whatever happens inside
    assert torch.equal(module.weight, live) and torch.equal(ema.averages["weight"], average)


# ----------------------------------------------------------------------------------------------------------- options


def test_a_learned_weight_schedule_moves_and_is_saved(configure: Configure) -> None:
    weight = "modalities.label.weight={schedule: learned, scale: 1.5, learn_scale: true}"
    folder = train(configure(weight, "train.steps=4", "train.learning_rate=0.01", "train.ema_decay=0"))
    saved = json.loads((folder / "pipeline/scheduler/scheduler_config.json").read_text())["weights"]["label"]
    trained = load_file(folder / "checkpoints/step-4/ema.safetensors")
    assert saved["parameters"] == pytest.approx(trained["schedule_shapes.label"].tolist())
    assert saved["log_scale"] == pytest.approx(trained["schedule_scales.label"].item()) and saved["log_scale"] != 0.0
    start = math.log(math.expm1(1 / 16))
    assert all(value != pytest.approx(start, abs=1e-6) for value in saved["parameters"])


def test_bf16_trains_after_float32_in_one_process(configure: Configure, tmp_path: Path) -> None:
    precise = train(configure("train.steps=2"))
    coarse = train(configure("train.steps=2", "train.mixed_precision=bf16", f"output={tmp_path / 'bf16'}"))
    one, other = (json.loads((folder / "metrics.jsonl").read_text()) for folder in (precise, coarse))
    assert other["loss"] == pytest.approx(one["loss"], rel=0.02) and other["l1"] != one["l1"]
    weights = load_file(coarse / "checkpoints/step-2/weights.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_wandb_writes_into_the_run_folder(configure: Configure) -> None:
    folder = train(configure("track=wandb", "train.steps=2"))
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1
    assert (folder / "metrics.jsonl").is_file()
