"""`mmdiff benchmark backbones` and `variants`: what they compare and write, what they refuse, that they resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused

from mmdiff.benchmarks.backbones import Request, diffusers_dit, our_dit, step_of
from mmdiff.benchmarks.interleaved import interleaved, ratio
from mmdiff.benchmarks.variants import Request as Variants
from mmdiff.benchmarks.variants import run

Cli = Callable[..., Any]
TINY = ["--batch", 2, "--side", 8, "--width", 16, "--heads", 2, "--depth", 1, "--deep", 3]
UNET = "unet backbone.kind=unet backbone.block_out_channels=[8,16] backbone.norm_num_groups=4 "
UNET += "backbone.attention_head_dim=8 backbone.layers_per_block=1"
DIT = "dit backbone.kind=dit backbone.depth=1 backbone.width=16 backbone.heads=2"


def test_sides_take_turns_and_ratios_are_those_of_rounds() -> None:
    calls: list[str] = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    assert "".join(calls) == "abbaabba" and all(len(seconds) == 3 for seconds in times.values())
    assert ratio({"a": [2.0, 3.0, 8.0], "b": [1.0, 1.0, 2.0]}, "a", "b") == (3.0, 2.0, 4.0)


def test_both_transformers_have_the_same_blocks() -> None:
    request = Request(side=8, width=16, heads=2, depth=2)
    counts = [
        sum(p.numel() for block in blocks for name, p in block.named_parameters() if p.ndim == 2 and "emb" not in name)
        for blocks in (our_dit(request, 2).layers, diffusers_dit(request).transformer_blocks)
    ]
    assert counts[0] == counts[1]


def test_a_step_gives_gradients_and_leaves_none() -> None:
    request = Request(batch=2, side=8, width=16, heads=2, depth=1)
    for network in (our_dit(request, 1), diffusers_dit(request)):
        seen: list[bool] = []
        for parameter in network.parameters():
            parameter.register_hook(lambda grad, seen=seen: seen.append(bool(grad.isfinite().all())))
        step_of(request, network, torch.bfloat16)()
        assert seen and all(seen)
        assert all(parameter.grad is None for parameter in network.parameters())


def test_the_benchmark_writes_every_comparison(cli: Cli, tmp_path: Path) -> None:
    answer = cli("benchmark", "backbones", *TINY, "--rounds", 1, "--out", tmp_path / "out" / "dit.json")
    assert answer.code == 0, answer.err
    tree = json.loads((tmp_path / "out" / "dit.json").read_text())
    assert {"date", "machine", "load", "versions", "threads"} <= set(tree) and tree["sizes"]["width"] == 16
    assert [row["bar"] for row in tree["rows"]] == [">= 1.0", ">= 1.0", ">= 1.7", "<= 1.35", "<= 0.6", ">= 1.6"]
    assert all(row["value"] > 0 for row in tree["rows"]) and all(row["name"] in answer.out for row in tree["rows"])


def test_sizes_that_do_not_fit_are_one_line(cli: Cli) -> None:
    answer = cli("benchmark", "backbones", *TINY, "--patch", 3)
    assert answer.code == 2 and "backbone.patch_size" in answer.err and "Traceback" not in answer.err


def test_variants_are_trained_once_and_told_by_time(cli: Cli, tiny_file: Path, tmp_path: Path) -> None:
    arguments = ["--variant", UNET, "--variant", DIT, "--seeds", 1, "--rows", 8, "--bins", 2, "--out", tmp_path / "out"]
    settings = ["train.steps=2", "train.batch_size=4"]
    seen = []
    for _ in range(2):
        answer = cli("benchmark", "variants", tiny_file, *settings, *arguments)
        assert answer.code == 0, answer.err
        seen.append({path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "parts").iterdir()})
    assert seen[0] == seen[1] and len(seen[0]) == 2
    tree = json.loads((tmp_path / "out" / "variants.json").read_text())
    for name in ("unet", "dit"):
        (result,) = tree["results"][name]
        assert result["steps"] == 2 and len(result["by time"]) == 2 and result["FD"] > 0
        assert name in answer.out and result["held-out loss"] == pytest.approx(sum(result["by time"]) / 2)


def test_a_budget_of_time_ends_a_training(tiny_file: Path, tmp_path: Path) -> None:
    settings = ("train.steps=1", "train.lr_scheduler_type=constant", "train.batch_size=4")
    run(Variants(tiny_file, settings, (DIT,), 1, 0.5, 4, 1, tmp_path / "out"))
    ((result,),) = json.loads((tmp_path / "out" / "variants.json").read_text())["results"].values()
    assert result["steps"] > 1 and result["seconds"] >= 0.5


def test_variants_that_do_not_fit_are_refused(tiny_file: Path, tmp_path: Path) -> None:
    def tried(*variants: str, seconds: float = 0.0) -> None:
        run(Variants(tiny_file, ("train.lr_scheduler_type=cosine",), variants, 1, seconds, 4, 1, tmp_path / "out"))

    for key, *wrong in (("--variant", ""), ("--variant", "'a"), ("--variant", "../a"), ("--variant", "a", "a")):
        with refused(key, wrong[-1]):
            tried(*wrong)
    with refused("override", "train.steps"):
        tried("a train.steps")
    with refused("train.lr_scheduler_type", "cosine"):
        tried("a", seconds=1.0)
    assert not (tmp_path / "out").exists()
