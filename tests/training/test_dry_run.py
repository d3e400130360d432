"""A dry run: its numbers against others' counts, and no trace of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from mmdiff.build import build_stand_in
from mmdiff.config import Config, load_config
from mmdiff.data.order import Visit
from mmdiff.errors import InputError, TrainingError
from mmdiff.objective import BatchPosition
from mmdiff.training.dry_run import dry_run
from mmdiff.training.memory import LAUNCH_FILES, SavedBytes, State
from mmdiff.training.process import make_accelerator
from mmdiff.training.trainer import Trainer

GIB = 2**30


class Report(NamedTuple):
    parameters: int
    state_gib: float
    kept_gib: float
    per_device: int  # samples
    flops: float
    samples: int
    parts: int
    seconds: float


def read(text: str) -> Report:
    assert text.splitlines()[0] == "dry run: 2 steps on stand-in data, 1 processes, cpu"
    numbers = [
        re.search(pattern, text, re.MULTILINE)
        for pattern in (
            r"^parameters +([\d,]+)$",
            r"([\d.]+) GiB weights, gradients, Adam, EMA",
            r"([\d.]+) GiB kept for the backward pass of (\d+) samples$",
            r"^FLOPs per step +(\S+) for (\d+) samples, (\d+) parts$",
            r"^seconds per step +([\d.]+)$",
        )
    ]
    found = [group.replace(",", "") for match in numbers if match for group in match.groups()]
    parameters, state, kept, per_device, flops, samples, parts, seconds = found
    return Report(
        int(parameters),
        float(state),
        float(kept),
        int(per_device),
        float(flops),
        int(samples),
        int(parts),
        float(seconds),
    )


@pytest.fixture
def configure(tiny: dict[str, Any], tmp_path: Path) -> Callable[..., Config]:
    """All settings are given; the source does not exist."""
    tiny["data"] = {"source": "no such source"}
    tiny["modalities"] = {
        "image": {"kind": "image", "channels": 1, "size": 16},
        "label": {"kind": "label", "num_classes": 10},
    }
    tiny["backbone"] |= {"block_out_channels": [32, 64], "patch_size": 1}
    tiny["train"] |= {"steps": 1, "batch_size": 64}
    OmegaConf.save(OmegaConf.create(tiny), tmp_path / "dry.yaml")
    return lambda *overrides: load_config(tmp_path / "dry.yaml", list(overrides))


def forward_flops(config: Config) -> tuple[float, float]:
    """(FLOPs of all convolutions and matrices in one forward pass, bytes of what they read), by the shapes alone."""
    experiment = build_stand_in(config)
    found, read_bytes = [], []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        each = module.weight[0].numel()  # multiplications per number that comes out
        found.append(2 * each * output.numel())
        read_bytes.append(4 * inputs[0].numel())

    for module in experiment.model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    size = config.train.batch_size
    batch = experiment.train.__getitems__([Visit(k, k) for k in range(size)])
    experiment.objective(batch, BatchPosition(0, torch.arange(size), size))
    return float(sum(found)), float(sum(read_bytes))


def test_parameters_and_bytes_of_state(configure: Callable[..., Config]) -> None:
    config = configure("backbone.block_out_channels=[64,192]", "train.batch_size=2")
    report = read(dry_run(config))
    parameters = sum(p.numel() for p in build_stand_in(config).objective.parameters())
    assert report.parameters == parameters > 4e6
    # float32: the weight, its gradient, two moments of Adam, the average
    assert report.state_gib == pytest.approx(parameters * 5 * 4 / GIB, abs=0.005)


def test_flops_are_three_forward_passes(configure: Callable[..., Config]) -> None:
    """Backward, every product of matrices becomes two."""
    report = read(dry_run(configure()))
    assert (report.samples, report.parts) == (64, 1)
    assert report.flops == pytest.approx(3 * forward_flops(configure())[0], rel=0.1)


def test_what_is_kept_is_at_least_what_the_layers_read(configure: Callable[..., Config]) -> None:
    """The inputs of convolutions are needed for the gradients of their weights; norms and activations keep as much."""
    report, inputs = read(dry_run(configure())), forward_flops(configure())[1]
    assert 1.0 < report.kept_gib * GIB / inputs < 3.5


def test_parts_halve_what_is_kept_and_cost_the_same(configure: Callable[..., Config]) -> None:
    whole, halves = read(dry_run(configure())), read(dry_run(configure("train.accumulate=2")))
    assert (whole.per_device, halves.per_device, halves.parts) == (64, 32, 2)
    assert halves.kept_gib == pytest.approx(whole.kept_gib / 2, abs=0.011)
    assert halves.flops == pytest.approx(whole.flops, rel=0.01)
    assert read(dry_run(configure("train.batch_size=32"))).flops == pytest.approx(whole.flops / 2, rel=0.01)


def test_every_kind_runs_on_stand_ins(configure: Callable[..., Config]) -> None:
    kinds = [
        "modalities.mask={kind: mask, num_classes: 3, size: 16, pattern_size: 2}",
        "modalities.masked={kind: masked_image, channels: 1, size: 16}",
        "modalities.clip={kind: embedding, dim: 12}",
        "modalities.depth={kind: dense, channels: 1, size: 16}",
        "data.masking.masked={pattern: box}",
    ]
    report = read(dry_run(configure(*kinds, "train.batch_size=4")))
    assert report.parameters > 0 and report.seconds >= 0


def test_nothing_is_opened_and_nothing_written(
    configure: Callable[..., Config], cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    answer = cli("train", tmp_path / "dry.yaml", "--dry-run", "train.batch_size=4")
    assert answer.code == 0, answer.err
    assert read(answer.out).samples == 4
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "modalities.other={kind: label}",
            "modalities.other.num_classes = None: is missing and the data do not determ",
        ),
        ("modalities.other={kind: mask, num_classes: 3}", "modalities.other.size = None: is missing"),
        ("modalities.other={kind: embedding}", "modalities.other.dim = None: is missing"),
        ("modalities.label.klasses=3", "modalities.label.klasses = 3: unknown key"),
        ("train.accumulate=3", "train.batch_size = 64: is the global batch; it must be a multiple of"),
    ],
)
def test_what_is_missing_is_named(
    configure: Callable[..., Config], cli: Callable[..., Any], tmp_path: Path, override: str, text: str
) -> None:
    with pytest.raises(InputError) as caught:
        dry_run(configure(override))
    assert str(caught.value).startswith(text)
    answer = cli("train", tmp_path / "dry.yaml", "--dry-run", override)
    assert answer.code == 2 and answer.complaint.startswith(text)


def test_one_that_diverges_says_so(configure: Callable[..., Config]) -> None:
    with pytest.raises(TrainingError, match=r"^step 2: \S+ is (nan|inf) at learning rate "):
        dry_run(configure("train.learning_rate=1e9", "train.warmup=0", "train.batch_size=4"))


def test_memory_of_the_state_is_what_a_step_leaves(configure: Callable[..., Config]) -> None:
    """The row of one process against the tensors of a real step, by their bytes."""
    config = configure("train.batch_size=4", "train.optimizer=muon", "train.ema_further_decays=[0.5]")
    trainer = Trainer(build_stand_in(config), make_accelerator(config.train))
    parameters = list(trainer.bare.parameters())
    before = [torch.zeros_like(p) for p in parameters]  # gradients, which a step clears
    trainer.step(*next(trainer.loader(0)))
    moments = [t for t in trainer.parallel.optimizer_tensors().values() if t.ndim]
    averages = [a for kept in trainer.ema.kept.values() for a in kept.values()]
    groups = (parameters, [g for g, p in zip(before, parameters) if p.requires_grad], moments, averages)
    held = [sum(t.numel() * t.element_size() for t in group) for group in groups]
    row = next(line for line in dry_run(config).splitlines() if line.startswith("cpu "))
    assert [float(cell) for cell in row.split()[1:5]] == [round(size / held[0] * 4, 2) for size in held]


def test_memory_per_image_is_what_a_larger_batch_adds(configure: Callable[..., Config]) -> None:
    text = dry_run(configure("train.batch_size=32"))
    per_image, fixed = map(float, re.search(r"([\d.e-]+) MiB per image and ([\d.e-]+) MiB for any", text).groups())
    experiment = build_stand_in(configure())
    saved, size = SavedBytes(experiment.objective), 32
    batch = experiment.train.__getitems__([Visit(k, k) for k in range(size)])
    with torch.autograd.graph.saved_tensors_hooks(saved.keep, saved.give):
        experiment.objective(batch, BatchPosition(0, torch.arange(size), size)).loss.backward()
    assert per_image * size + fixed == pytest.approx(saved.bytes / 2**20, rel=0.02)


@pytest.mark.parametrize("processes", [2, 8])
def test_memory_shrinks_with_the_processes_that_share_it(processes: int) -> None:
    state = State(weights=100, trained=80, moments=160, averages=80, gathered=30)
    bytes_of = {name: state.bytes(name, processes) for name in LAUNCH_FILES}
    assert sum(bytes_of["ddp"].values()) == 4 * (100 + 80 + 160 + 80)
    assert sum(bytes_of["fsdp2"].values()) == 4 * (100 + 80 + 160 + 80) / processes + 8 * 30
    assert sum(bytes_of["deepspeed_zero2"].values()) == 4 * (100 + 80) + 4 * (80 + 160 + 80) / processes
