"""What a run tells of itself: trackers, gradients of terms, use of the machine, and its line on the console."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import random_model
from PIL import Image
from refusals import refused
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmdiff.config import Config, load_config, parse_config
from mmdiff.training import train
from mmdiff.training.console import Console
from mmdiff.training.interference import interference
from mmdiff.training.meter import image_flops, peak_of
from mmdiff.training.trackers import SINKS, Sink
from mmdiff.training.tracking import MACHINE

Configure = Callable[..., Config]


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step}" / "weights.safetensors")


# --------------------------------------------------------------------------------------------------------- trackers


def test_all_trackers_get_every_line_and_grid_also_of_a_resumed_run(configure: Configure) -> None:
    """Steps 5 and 6 are told again after the checkpoint at 4 is continued; each counts once."""
    options = ["track=[tensorboard,wandb]", "train.log_every=1", "train.checkpoint_every=4", "train.sample_every=3"]
    folder = train(configure(*options))
    for name in ("pipeline", "checkpoints/step-6"):
        (folder / name).rename(folder.parent / Path(name).name)
    train(configure(*options, "train.resume=auto"))
    found, expected = events(folder), lines(folder)
    assert set(found.Tags()["scalars"]) == set(expected[0]) - {"step"} > set(MACHINE)
    for name in ("loss", "l2/label", "learning_rate"):
        told = [(event.step, event.value) for event in found.Scalars(name)]
        assert told == [(line["step"], pytest.approx(line[name])) for line in expected]
    assert [event.step for event in found.Images("samples")] == [3, 6]
    with Image.open(folder / "samples" / "step-6.png") as grid:
        assert (found.Images("samples")[-1].width, found.Images("samples")[-1].height) == grid.size
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2


class Broken(Sink):
    """Takes two lines and no third."""

    def __init__(self, folder: Path, config: Config, first_step: int) -> None:
        self.taken = 0

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.taken += 1
        if self.taken > 2:
            raise ConnectionError("the service\nis away")

    def image(self, name: str, path: Path, step: int) -> None:
        raise AssertionError("it failed before")

    def close(self) -> None:
        raise AssertionError("it failed before")


def test_a_tracker_that_fails_costs_one_line(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SINKS, "wandb", Broken)
    folder = train(configure("track=[wandb,tensorboard]", "train.log_every=1"), progress=False)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "wandb" in warnings[0] and "ConnectionError: the service" in warnings[0]
    assert len(lines(folder)) == 6 == len(events(folder).Scalars("loss"))


def test_what_cannot_be_tracked_is_refused(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ["mlflow", ["wandb", "mlflow"], [], 3]:
        with refused("track", value):
            configure(f"track={json.dumps(value)}")
    with refused("train.gradients_every", 5, "3"):
        configure("train.gradients_every=5")
    with refused("train.gradients_every", 3, "sharding"):
        train(configure("train.gradients_every=3", "train.sharding=fsdp2"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where the extra is not installed
    with refused("track", "tensorboard", "mmdiff[tensorboard]"):
        train(configure("track=tensorboard"))


# ------------------------------------------------------------------------------------------------ gradients of terms


def test_norms_and_cosines_are_those_of_each_terms_own_backward_pass() -> None:
    torch.manual_seed(0)
    shared, head, elsewhere = nn.Linear(3, 4), nn.Linear(4, 1), nn.Parameter(torch.ones(()))
    frozen = nn.Linear(3, 3).requires_grad_(False)
    hidden = shared(frozen(torch.randn(5, 3)))
    parts = {
        "l0": elsewhere**2,  # does not reach the shared parameters
        "l1": hidden.square().mean(),
        "l3": 0.5 * hidden.mean(),
        "l2/label": 0.1 * head(hidden).mean(),
        "l2/none": 0.0 * hidden.sum(),
        "weight": torch.ones(()),
    }
    found = interference(parts, [*shared.parameters(), *frozen.parameters()])
    assert all(p.grad is None for p in (*shared.parameters(), *head.parameters()))
    by_hand = {}
    for name, part in {"l1": parts["l1"] + parts["l3"], "l2/label": parts["l2/label"]}.items():
        shared.zero_grad()
        part.backward(retain_graph=True)
        by_hand[name] = torch.cat([p.grad.flatten() for p in shared.parameters()])
    assert set(found) == {f"norm/{n}" for n in ("l1", "l2/label", "l2/none")} | {
        "cosine/l1:l2/label",
        "cosine/l1:l2/none",
        "cosine/l2/label:l2/none",
    }
    for name, gradient in by_hand.items():
        torch.testing.assert_close(found[f"norm/{name}"], gradient.norm())
    torch.testing.assert_close(found["cosine/l1:l2/label"], torch.cosine_similarity(*by_hand.values(), dim=0))
    assert found["norm/l2/none"] == found["cosine/l1:l2/none"] == 0
    sum(parts.values()).backward()  # the graph is still there


@pytest.mark.parametrize("backbone", ["unet", "dit"])
def test_measuring_gradients_leaves_the_weights_as_they_are_to_the_bit(
    configure: Configure, tmp_path: Path, backbone: str
) -> None:
    """With dropout, parts and recomputed activations."""
    unet = {"dropout": 0.3, "block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 8}
    sizes = {"unet": unet, "dit": {"depth": 2, "width": 16, "heads": 2}}[backbone]
    tree = configure("train.accumulate=2", "train.log_every=2").model_dump()
    tree["backbone"] = {"kind": backbone, "gradient_checkpointing": True, **sizes}
    folders = []
    for every in (0, 4):
        train_section = {**tree["train"], "gradients_every": every}
        folders.append(train(parse_config({**tree, "output": str(tmp_path / f"{every}"), "train": train_section})))
    one, other = (weights(folder, 6) for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in one)
    measured = [{name for name in line if name.startswith(("norm/", "cosine/"))} for line in lines(folders[1])]
    assert measured == [set(), {"norm/l1", "norm/l2/label", "cosine/l1:l2/label"}, set()]
    assert -1 <= lines(folders[1])[1]["cosine/l1:l2/label"] <= 1
    shared = [{key: value for key, value in line.items() if key in lines(folders[0])[0]} for line in lines(folders[1])]
    assert [{k: v for k, v in line.items() if k not in MACHINE} for line in shared] == [
        {k: v for k, v in line.items() if k not in MACHINE} for line in lines(folders[0])
    ]


@pytest.mark.slow
def test_two_processes_measure_gradients_without_waiting_for_one_another(
    tiny_file: Path, forked: Callable[..., Any], tmp_path: Path
) -> None:
    def run(name: str, every: int) -> Any:
        more = [f"output={tmp_path / name}", f"train.gradients_every={every}", "train.accumulate=2"]
        return forked(["train", tiny_file, *more], tmp_path / f"{name}-log", processes=2)

    started = [run("without", 0), run("with", 3)]
    for process in started:
        answer = process.wait()
        assert answer.code == 0, answer.err
    one, other = (weights(tmp_path / name, 6) for name in ("without", "with"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all({"norm/l1", "cosine/l1:l2/label"} < set(line) for line in lines(tmp_path / "with"))


# -------------------------------------------------------------------------------------------------------- the machine


def test_flops_of_an_image_are_those_of_a_step_and_counting_them_moves_nothing() -> None:
    model = random_model(
        {"image": {"kind": "image", "channels": 1, "size": 16}, "label": {"kind": "label", "num_classes": 3}}
    ).train()
    state = torch.get_rng_state()
    counted = image_flops(model)
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())
    z = torch.randn(4, *model.space)
    with FlopCounterMode(display=False) as counter:
        output = model(z, torch.zeros(4, dtype=torch.int64), model.observation({}, {}, {}, like=z))
        (output.prediction.sum() + output.params["label"].sum()).backward()
    assert counted == pytest.approx(counter.get_total_flops() / 4, rel=0.05)  # the input needs no gradient


def test_the_peak_is_measured_where_no_data_sheet_is_known() -> None:
    state = torch.get_rng_state()
    peak, source = peak_of(torch.device("cpu"), "no")
    assert 1e8 < peak < 1e14 and "cpu" in source and "float32" in source
    assert torch.equal(torch.get_rng_state(), state)


def test_a_line_measures_the_machine(configure: Configure) -> None:
    folder = train(configure("train.log_every=1"))
    for line in lines(folder):
        assert line["images_per_second"] > 0 and 0 < line["mfu"] < 2 and 0.05 < line["memory_gib"] < 1e4
    ratios = [line["mfu"] / line["images_per_second"] for line in lines(folder)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


# -------------------------------------------------------------------------------------------------------- the console

LINE = {"loss": 1234.5678, "images_per_second": 123456.7, "learning_rate": 1.5e-4, "mfu": 0.4567}


def test_a_log_file_gets_one_line_now_and_then(capsys: pytest.CaptureFixture[str], tiny_file: Path) -> None:
    with Console(10**9, 0, shown=True) as console:
        for step in range(1, 500):
            console.step()
            console.line({"step": step, **LINE})
        console.line({"step": 10**9, **LINE})
    said = capsys.readouterr().err
    assert "\r" not in said and len(said.splitlines()) == 2  # the first and the last within the pause
    assert all(len(line) <= 100 for line in said.splitlines())
    for part in ("step 1000000000/1000000000", "loss 1235", "lr 1.50e-04", "1.235e+05 images/s", "MFU 45.7%", "eta 0:"):
        assert part in said.splitlines()[-1]
    train(load_config(tiny_file), progress=False)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_one_line_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (100, 60):
        terminal, own = os.openpty()
        fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        with os.fdopen(own, "w") as stderr, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stderr)
            with Console(20, 0, shown=True) as console:
                console._bar.mininterval = 0.0
                for step in range(1, 21):
                    console.line({"step": step, **LINE})
                    console.step()
            stderr.flush()
            said = ""
            while "\n" not in said:  # the pieces of what stands in the terminal
                said += os.read(terminal, 10**6).decode()
        os.close(terminal)
        states = [state for state in said.replace("\n", "").split("\r") if state.strip()]
        assert said.count("\n") == 1 and len(states) > 1 and "loss 1235" in states[-1]
        assert max(len(state.rstrip()) for state in states) <= columns
        assert ("MFU" in states[-1]) == (columns == 100)
