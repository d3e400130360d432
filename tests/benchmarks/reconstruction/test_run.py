"""The reconstruction benchmark: the same images and holes for all, parts that are taken up again and never mixed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from networks import alive
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from mmdiff.benchmarks.reconstruction import report
from mmdiff.benchmarks.reconstruction.benchmark import RAW, Benchmark, HoleSet, digest
from mmdiff.benchmarks.reconstruction.methods import METHODS, Options, entries
from mmdiff.benchmarks.reconstruction.trained import Trained
from mmdiff.build import build
from mmdiff.config import load_config, parse_config, save_config
from mmdiff.errors import InputError
from mmdiff.evaluation.holes import pasted, per_image
from mmdiff.metrics.bootstrap import interval
from mmdiff.pipeline import MTDiffusionPipeline

Cli = Callable[..., Any]
SIZE = 16
OPTIONS = Options(steps=(2,), repaint=((2, 2, 4),), sdedit=(3,))
BASELINES = ("masked", "mean", "blur", "telea", "navier-stokes")


def tree(name: str, backbone: Path, masked: bool = True) -> dict[str, Any]:
    """Shapes at toy size."""
    data: dict[str, Any] = {"source": "shapes", "options": {"rows": 24, "validation_rows": 12, "size": SIZE}}
    modalities: dict[str, Any] = {"image": {"kind": "image"}}
    if masked:
        data["masking"] = {"masked_image": {"pattern": "mixed", "ratio": [0.1, 0.75]}}
        modalities["masked_image"] = {"kind": "masked_image", "states": {"observed": 0.7}}
    return {
        "name": name,
        "data": data,
        "modalities": modalities,
        "backbone": {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8},
        "scheduler": {"prediction_type": "sample", "num_train_timesteps": 50},
        "states": {"anchor_observed": 0.0, "anchor_hidden": 0.2 if masked else 0.0},
        "train": {"steps": 4, "batch_size": 4, "warmup": 0, "threads": 1, "optimizer": "muon"},
        "sample": {"steps": 1},
        "evaluate": {"at_end": False, "lpips": {"net": "squeeze", "backbone": str(backbone)}},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    """Run folders "both" and "plain", of random weights."""
    folder = tmp_path_factory.mktemp("reconstruction")
    for name, masked in (("both", True), ("plain", False)):
        experiment = build(parse_config(tree(name, backbone, masked)))
        torch.manual_seed(0)
        alive(experiment.model)
        pipeline = MTDiffusionPipeline(model=experiment.model, scheduler=experiment.scheduler)
        pipeline.save_pretrained(folder / name / "pipeline")
        save_config(experiment.config, folder / name / "config.yaml")
    return folder


def loaded(folder: Path, *names: str) -> list[Trained]:
    found = []
    for name in names or ("both", "plain"):
        pipeline = MTDiffusionPipeline.from_pretrained(folder / name / "pipeline")
        pipeline.set_progress_bar_config(disable=True)
        found.append(Trained(name, load_config(folder / name / "config.yaml"), pipeline, folder / name))
    return found


def benchmark_of(runs: list[Trained], out: Path, **settings: Any) -> Benchmark:
    return Benchmark(runs, out, **{"images": 4, "seeds": 2, "ratios": (0.25, 0.5), "options": OPTIONS} | settings)


def parts(out: Path) -> dict[str, int]:
    """{file: when it was written}."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}


class Whole(NamedTuple):
    """A benchmark that ran through."""

    benchmark: Benchmark
    results: list[Any]
    tree: dict[str, Any]
    out: Path


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    out = tmp_path_factory.mktemp("whole")
    benchmark = benchmark_of(loaded(folder), out)
    results = benchmark.results(progress=False)
    yield Whole(benchmark, results, report.tree(benchmark, results), out)


def numbers(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows without times."""
    return [{k: v for k, v in row.items() if k != "seconds per image"} for row in found["rows"]]


# ------------------------------------------------------------------------------------------------------- the protocol


def test_masks_and_images_are_fixed_by_their_seed(whole: Whole, folder: Path, tmp_path: Path) -> None:
    other = benchmark_of(loaded(folder, "plain"), tmp_path, ratios=(0.5,), images=4, methods=["mean"])
    assert torch.equal(other.truth, whole.benchmark.truth)
    (same,) = (holes for holes in whole.benchmark.holes if holes.ratio == 0.5)
    assert other.holes[0].facts() == same.facts() and same.facts()["seed"] == 0
    assert other.images_digest == whole.benchmark.images_digest
    hashes = [holes.facts()["sha256"] for holes in whole.benchmark.holes]
    more = benchmark_of(loaded(folder, "plain"), tmp_path, patterns=("box",), images=4, methods=["mean"]).holes
    assert len({*hashes, *(holes.facts()["sha256"] for holes in more)}) == 4
    changed = HoleSet(same.pattern, same.ratio, same.known.clone())
    changed.known[3, 0, 5, 7] = 1 - changed.known[3, 0, 5, 7]
    assert changed.facts()["sha256"] != same.facts()["sha256"]
    assert digest(same.known.bool()) != digest(same.known.bool().reshape(4, 1, SIZE // 2, SIZE * 2))


def test_every_method_is_there_and_costs_what_it_costs(whole: Whole) -> None:
    own = ["head", "concatenation", "replacement", "concatenation+replacement"]
    labels = [entry.label for entry in whole.benchmark.entries]
    assert [label.split(" (")[0] for label in labels] == [
        *BASELINES,
        *(f"both: {name}" for name in own),
        "plain: repaint",
        "plain: sdedit",
    ]
    rows = {(row["method"].split(" (")[0], row["ratio"]): row for row in whole.tree["rows"]}
    assert len(rows) == 2 * len(labels)
    expected = {"mean": 0, "both: head": 1, "both: concatenation": 2, "plain: repaint": 6, "plain: sdedit": 3}
    for name, evaluations in expected.items():
        assert rows[name, 0.25]["evaluations per image"] == evaluations, name
    for (name, _), row in rows.items():
        drawn = METHODS[row["by"]].seeded
        assert len(row["seeds"]) == 1 + drawn and (row["diversity"] is not None) == drawn
        assert row["diversity"] is None or row["diversity"] > 0
        for score in ("LPIPS, hole", "PSNR, whole", f"SSIM, hole, {RAW}"):
            low, high = row[f"{score}, 95 %"]
            assert low <= row[score] <= high
            assert np.mean(row[f"{score}, by seed"]) == pytest.approx(row[score])
        if "replacement" in name or name.startswith("plain"):  # they put known pixels back by themselves
            assert row["PSNR, whole"] == pytest.approx(row[f"PSNR, whole, {RAW}"], abs=1e-6)
    assert rows["both: concatenation", 0.5]["PSNR, whole"] > rows["both: concatenation", 0.5][f"PSNR, whole, {RAW}"] + 1


def test_stored_scores_are_those_of_the_stored_fills(whole: Whole) -> None:
    for result in whole.results[-8:]:
        truth, known = whole.benchmark.truth, result.holes.known
        for cell in result.cells:
            images = cell.fills.float() / 127.5 - 1
            filled = pasted(images, truth, known)
            assert torch.equal(filled * known, truth * known)
            for name, values in per_image(filled, truth, known, whole.benchmark.perceptual).items():
                assert torch.allclose(values, cell.scores[name])
            seen = torch.where(known > 0, torch.rand(truth.shape) * 2 - 1, images)  # known pixels do not count
            again = per_image(pasted(seen, truth, known), truth, known, whole.benchmark.perceptual)
            assert torch.equal(
                again["LPIPS, hole"], per_image(filled, truth, known, whole.benchmark.perceptual)["LPIPS, hole"]
            )


def test_differences_are_image_by_image(whole: Whole) -> None:
    reference = whole.tree["manifest"]["compared with"]
    assert reference == "both: concatenation (steps 2)"
    by = {(result.entry.label, result.holes.ratio): result for result in whole.results}
    assert len(whole.tree["differences"]) == 2 * (len(whole.benchmark.entries) - 1)
    for found in whole.tree["differences"]:
        pair = [by[label, found["ratio"]] for label in (found["method"], reference)]
        other, base = (
            torch.stack([cell.scores["LPIPS, hole"] for cell in result.cells]).double().mean(0) for result in pair
        )
        assert found["LPIPS, hole"]["mean"] == pytest.approx(float((other - base).mean()))
        assert found["LPIPS, hole"]["95 %"] == pytest.approx(list(interval((other - base).numpy())))
    own = report.tree(whole.benchmark, whole.results, "telea")
    assert {row["method"] for row in own["differences"]} == {e.label for e in whole.benchmark.entries} - {"telea"}
    with pytest.raises(InputError, match="--reference = 'mine': choose one of masked; mean"):
        report.tree(whole.benchmark, whole.results, "mine")


def test_settings_are_chosen_on_training_images(whole: Whole) -> None:
    chosen = whole.tree["manifest"]["chosen on training images"]
    assert set(chosen) == {"blur", "plain: repaint", "plain: sdedit"}
    for found in chosen.values():
        best = min(found["trials"], key=lambda trial: trial["LPIPS, hole"])
        assert found["chosen"] == {name: value for name, value in best.items() if name != "LPIPS, hole"}
    assert len(chosen["plain: sdedit"]["trials"]) == 10


def test_the_manifest_and_the_table(whole: Whole) -> None:
    manifest = json.loads(json.dumps(whole.tree["manifest"]))
    assert manifest["LPIPS sizes"].startswith("smaller images enlarged to 64 px")
    assert "upsampled" in manifest["LPIPS on the hole"] and "squeeze" in manifest["LPIPS"]
    assert manifest["runs"]["both"]["samples seen"] == 16
    text = report.text(whole.tree)
    for entry in whole.benchmark.entries:
        assert text.count(entry.label) >= 4 or entry.label == manifest["compared with"]
    columns = report.pictures(whole.benchmark, whole.results)
    assert list(columns)[:2] == ["source", "masked"]
    assert all(len(column) == 8 and column[0].size == (SIZE, SIZE) for column in columns.values())


def test_patterns_together_are_means_over_patterns(folder: Path, tmp_path: Path) -> None:
    benchmark = benchmark_of(
        loaded(folder, "both"), tmp_path, patterns=("squares", "half"), ratios=(0.5,), methods=["mean", "concatenation"]
    )
    results = benchmark.results(progress=False)
    found = report.tree(benchmark, results)
    assert [row["pattern"] for row in found["rows"]] == ["all"] * 2 + ["squares"] * 2 + ["half"] * 2
    scores = [row["LPIPS, hole"] for row in found["rows"] if row["by"] == "concatenation"]
    assert scores[0] == pytest.approx(np.mean(scores[1:]))
    assert "holes half" in report.text(found) and "holes half" not in report.text(found, each_pattern=False)


# ------------------------------------------------------------------------------------------------ taken up, never mixed


def test_an_interrupted_benchmark_goes_on(whole: Whole, folder: Path, tmp_path: Path) -> None:
    few = {"ratios": (0.5,), "methods": ["mean", "concatenation", "repaint"]}
    first = benchmark_of(loaded(folder), tmp_path, **few)
    for entry in first.entries[:2]:  # and then the power fails
        first.cell(entry, first.holes[0], 0)
    half = tmp_path / "parts" / "half-written.partial"
    half.write_bytes(b"\0")
    before = parts(tmp_path)
    benchmark = benchmark_of(loaded(folder), tmp_path, **few)
    found = report.tree(benchmark, benchmark.results(progress=False))
    assert numbers(found) == [row for row in numbers(whole.tree) if row["ratio"] == 0.5 and row["by"] in few["methods"]]
    assert {name: parts(tmp_path)[name] for name in before} == before
    assert len(before) == 3 and set(parts(tmp_path)) - {half.name} < set(parts(whole.out))


def test_nothing_is_computed_twice(whole: Whole, folder: Path) -> None:
    before, runs = parts(whole.out), loaded(folder)
    with runs[0].counting() as both, runs[1].counting() as plain:
        benchmark = benchmark_of(runs, whole.out)
        found = report.tree(benchmark, benchmark.results(progress=False))
    assert not both and not plain and parts(whole.out) == before
    assert found["rows"] == whole.tree["rows"] and found["differences"] == whole.tree["differences"]


def test_other_weights_are_not_mixed(whole: Whole, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "runs")
    shutil.copytree(whole.out, tmp_path / "out")
    (file,) = (tmp_path / "runs" / "both").rglob("*.safetensors")
    state = load_file(file)
    name = next(name for name in state if "conv_out" in name)
    save_file({**state, name: state[name] + 0.01}, file, metadata={"format": "pt"})
    runs = loaded(tmp_path / "runs")
    with runs[0].counting() as both, runs[1].counting() as plain:
        benchmark = benchmark_of(runs, tmp_path / "out")
        found = report.tree(benchmark, benchmark.results(progress=False))
    assert both and not plain
    changed = [now["method"] for now, then in zip(numbers(found), numbers(whole.tree), strict=True) if now != then]
    assert changed and {method.split(":")[0] for method in changed} == {"both"}


def test_a_part_under_a_false_name_is_refused(whole: Whole, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.out, tmp_path / "out")
    one, other = sorted((tmp_path / "out" / "parts").glob("baseline-mean-*"))
    shutil.copy(one, other)
    with pytest.raises(InputError, match="holds another part than its name says"):
        benchmark_of(loaded(folder), tmp_path / "out").results(progress=False)


def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path, backbone: Path) -> None:
    both, plain = loaded(folder)
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("--methods = 'magic'", lambda: entries([both], OPTIONS, ["magic"])),
        ("--methods = 'repaint': none of both was trained for it", lambda: entries([both], OPTIONS, ["repaint"])),
        ("RUN = 'both': is the name of two runs", lambda: benchmark_of([both, both], tmp_path)),
        ("pattern = 'ring'", lambda: benchmark_of([both], tmp_path, patterns=["ring"], methods=["mean"])),
    ]
    plain.config.data.options["rows"] = 5
    cases.append(("RUN = 'plain': has other data than both", lambda: benchmark_of([both, plain], tmp_path)))
    for start, call in cases:
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value).startswith(start)


# ------------------------------------------------------------------------------------------------ one command for all


def test_one_command_trains_and_scores_them_all(cli: Cli, tmp_path: Path, backbone: Path) -> None:
    for name, masked in (("both", True), ("plain", False)):
        OmegaConf.save(OmegaConf.create(tree(name, backbone, masked)), tmp_path / f"{name}.yaml")
    command = [
        "benchmark",
        "reconstruction",
        tmp_path / "both.yaml",
        tmp_path / "plain.yaml",
        "--images",
        3,
        "--steps",
        1,
    ]
    command += [
        "--methods",
        "mean,concatenation,repaint",
        "--repaint",
        "1,1,2",
        "--sweep",
        "0.5,1",
        "--out",
        tmp_path / "out",
    ]
    first = cli(*command)
    assert first.code == 0, first.err
    assert "plain: repaint (jumps 1,1,2, eta " in first.out and "minus both: concatenation (steps 1)" in first.out
    for name in ("both", "plain"):
        run, short = tmp_path / "out" / "runs" / name, tmp_path / "out" / "sweeps" / name
        sweep = json.loads((run / "sweep.json").read_text())
        losses = sweep["validation loss by learning rate"]
        assert set(losses) == {"0.0005", "0.001"} and sweep["best"] == float(min(losses, key=losses.__getitem__))
        assert load_config(run / "config.yaml").train.learning_rate == sweep["chosen"]
        assert load_config(run / "config.yaml").train.steps == 4
        assert sorted(path.name for path in short.iterdir()) == ["rate-0.0005", "rate-0.001"]
        assert (short / "rate-0.001" / "curves.png").is_file() and (run / "metrics.jsonl").is_file()
    found = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert found["manifest"]["runs"]["both"]["sweep"]["steps"] == 1
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    again = cli(*command)
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")} == files
    assert (tmp_path / "out" / "reconstruction-1.json").is_file()  # kept
    changed = cli(*command, "train.weight_decay=0.1")
    assert changed.code == 2 and changed.complaint.startswith("train.weight_decay = 0.1: the run in ")


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["--repaint", "5,3"], "--repaint"),
        (["--ratios", "half"], "--ratios = 'half': write numbers with commas"),
        (["--sweep", "0,1"], "--sweep"),
        (["--steps", "1.5"], "--steps = '1.5': write whole numbers"),
    ],
)
def test_bad_options_are_named(cli: Cli, tmp_path: Path, backbone: Path, arguments: list[str], start: str) -> None:
    OmegaConf.save(OmegaConf.create(tree("both", backbone)), tmp_path / "both.yaml")
    answer = cli("benchmark", "reconstruction", tmp_path / "both.yaml", *arguments, "--out", tmp_path / "out")
    assert answer.code == 2 and answer.complaint.startswith(start)
    assert not (tmp_path / "out").exists()
