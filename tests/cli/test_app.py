"""The command line: good input gives files and tables, bad input gives exit code 2 and one line on stderr."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmdiff.data import open_splits
from mmdiff.training.checkpoint import seal

Cli = Callable[..., Any]


# --------------------------------------------------------------------------------------------------------- good paths


def test_train_ends_with_a_pipeline_a_grid_and_a_table(cli: Cli, tiny_file: Path, tmp_path: Path) -> None:
    answer = cli("train", tiny_file, "train.steps=2", "evaluate.at_end=true", "evaluate.num_samples=20")
    run = tmp_path / "run"
    assert answer.code == 0
    first, second, *table = answer.out.splitlines()
    assert (first, second) == (f"pipeline: {run / 'pipeline'}", f"samples: {run / 'samples' / 'step-2.png'}")
    assert (run / "samples" / "step-2.png").is_file()
    text = "\n".join(table)
    assert "label → image" in text and "image → label" in text and "joint" in text
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    assert {(row["direction"], row["of"]) for row in rows} == {
        ("image → label", "label"),
        ("joint", "image"),
        ("joint", "label"),
        ("label → image", "image"),
        ("label → image", "label"),
    }
    assert "Traceback" not in answer.err and "mmdiff:" not in answer.err


def test_a_second_evaluation_keeps_the_first(cli: Cli, run_copy: Path) -> None:
    answer = cli("evaluate", run_copy, "evaluate.num_samples=20", "--steps", "3,5")
    assert answer.code == 0, answer.err
    first = (run_copy / "evaluation.json").read_bytes()
    rows = json.loads(first)["rows"]
    drawn = [row for row in rows if row["direction"] != "image → label"]  # that is read in one evaluation
    assert {row["setting"]["steps"] for row in drawn} == {3, 5}
    assert (
        cli("evaluate", run_copy, "evaluate.num_samples=20", "--solver", "DDIMScheduler", "--feedback", "mean").code
        == 0
    )
    now = json.loads((run_copy / "evaluation.json").read_text())
    assert now["manifest"]["solver"] == "DDIMScheduler"
    (earlier,) = now["earlier"].values()
    assert earlier == {key: json.loads(first)[key] for key in ("manifest", "rows")}
    assert earlier["manifest"]["real rows used"] == {"training": 1498, "held out": 299}


def test_a_broken_evaluation_is_named_and_left(cli: Cli, run_copy: Path) -> None:
    path = run_copy / "evaluation.json"
    path.write_text('{"manifest": {')
    assert cli("evaluate", run_copy).complaint.startswith(f"evaluation.json = {str(path)!r}: is no whole evaluation")
    assert path.read_text() == '{"manifest": {'


def test_the_version_and_completion(cli: Cli) -> None:
    import mmdiff

    assert cli("--version").out == f"mmdiff {mmdiff.__version__}\n"
    assert "--install-completion" in cli("--help").out


def test_sample_writes_a_grid_and_prints_the_labels(cli: Cli, finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "grid.png"
    answer = cli("sample", finished_run, "--observe", "label=3", "--num", 6, "--steps", 2, "--out", out)
    assert answer.code == 0, answer.err
    assert answer.out.splitlines() == [f"wrote {out}", "label: 3 3 3 3 3 3"]
    with Image.open(out) as grid:
        assert grid.size == (2 * 50 + 2, 3 * (50 + 15) + 2)  # 2 columns of 3 · 16 pixels, gaps of 2, captions of 15

    def another(*arguments: object) -> bytes:
        path = tmp_path / "another.png"
        path.unlink(missing_ok=True)
        assert cli("sample", *arguments, "--num", 6, "--steps", 2, "--out", path).code == 0
        return path.read_bytes()

    assert another(finished_run / "pipeline", "--observe", "label=3") == out.read_bytes()  # a pipeline folder will do
    assert another(finished_run, "--observe", "label=4") != out.read_bytes()
    assert another(finished_run, "--observe", "label=3", "--seed", 1) != out.read_bytes()


def test_sample_reads_an_observed_image(cli: Cli, finished_run: Path, tmp_path: Path) -> None:
    digit = open_splits("digits")[1][0]["image"]
    digit.save(tmp_path / "digit.png")
    out = tmp_path / "seen.png"
    answer = cli("sample", finished_run, "--observe", f"image={tmp_path / 'digit.png'}", "--num", 1, "--out", out)
    assert answer.code == 0, answer.err
    assert re.fullmatch(r"label: \d", answer.out.splitlines()[1])
    with Image.open(out) as grid:
        assert np.array_equal(np.asarray(grid)[2:50:3, 2:50:3, 0], np.asarray(digit))  # returned bit by bit


def test_show_describes_and_plots(cli: Cli, tiny_file: Path, tmp_path: Path) -> None:
    answer = cli("show", tiny_file, "--plot", tmp_path / "weights.png")
    assert answer.code == 0, answer.err
    assert re.search(r"^W_t label .*peak 1\.5 at t = \d+, at T ", answer.out, flags=re.MULTILINE)
    counts = dict(re.findall(r"^parameters, (\w+) +([\d,]+)$", answer.out, flags=re.MULTILINE))
    numbers = {name: int(text.replace(",", "")) for name, text in counts.items()}
    assert numbers["all"] == numbers["backbone"] + numbers["image"] + numbers["label"] > numbers["label"] > 10 * 256
    assert "rows: 1498 for training, 299 held out" in answer.out
    assert "num_classes: 10" in answer.out  # resolved
    with Image.open(tmp_path / "weights.png") as plot:
        assert plot.width > 300
    assert not (tmp_path / "run").exists()


def test_help_lists_the_benchmarks(cli: Cli) -> None:
    assert all(name in cli("benchmark", "--help").out for name in ("speed", "reconstruction"))


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("train.step=5", "train.step = 5: unknown key; did you mean steps?"),
        ("train.steps=many", "train.steps = 'many': "),
        ("modalities.label.clases=3", "modalities.label.clases = 3: unknown key"),
        ("data.columns.label=digit", "data.columns.label = 'digit': the source has no such column"),
        (
            "modalities.image.size=[8,8] data.cache_mib=9",
            "data.columns.image=image, row 0 of digits: image = '16x16': expected 8x8",
        ),
        ("scheduler.solver=HeunDiscreteScheduler", "scheduler.solver = 'HeunDiscreteScheduler': "),
        ("train.batch_size=13 train.accumulate=2", "train.batch_size = 13: "),
        ("scheduler.beta_schedule=linear", "modalities.label.weight = "),
    ],
)
def test_train_refuses_a_bad_config(cli: Cli, tiny_file: Path, tmp_path: Path, override: str, start: str) -> None:
    answer = cli("train", tiny_file, *override.split())
    assert answer.code == 2
    assert answer.complaint.startswith(start)
    assert not (tmp_path / "run").exists()


def test_a_missing_config_and_a_folder_that_exists_are_refused(cli: Cli, tiny_file: Path, finished_run: Path) -> None:
    answer = cli("train", "nowhere.yaml")
    assert (answer.code, answer.complaint) == (2, "config = 'nowhere.yaml': no such file")
    answer = cli("train", tiny_file, f"output={finished_run}")
    assert answer.code == 2 and answer.complaint.startswith(f"output = '{finished_run}': exists; ")


def test_a_checkpoint_that_does_not_match_is_refused(cli: Cli, run_copy: Path) -> None:
    path = run_copy / "checkpoints" / "step-12" / "weights.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if "table" not in name}, path)
    state = json.loads((path.parent / "state.json").read_text())
    seal(path.parent, {key: value for key, value in state.items() if key not in ("files", "sha256")})
    answer = cli("train", run_copy / "config.yaml", f"output={run_copy}", "train.resume=auto")
    assert answer.code == 2
    assert answer.complaint.startswith("train.resume = ") and "model.modalities.label.table" in answer.complaint
    answer = cli("train", run_copy / "config.yaml", f"output={run_copy}", "train.resume=auto", "backbone.dropout=0.5")
    assert answer.code == 2 and answer.complaint.startswith("backbone.dropout = 0.5: the run in ")


@pytest.mark.parametrize("damage", ["missing", "torn", "other shapes"])
def test_a_damaged_pipeline_is_refused(cli: Cli, run_copy: Path, tmp_path: Path, damage: str) -> None:
    path = run_copy / "pipeline" / "model" / "diffusion_pytorch_model.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        save_file({name: torch.zeros(3) for name in load_file(path)}, path)
    answer = cli("sample", run_copy, "--num", 1, "--out", tmp_path / "grid.png")
    assert answer.code == 2 and str(run_copy) in answer.complaint


BAD_SAMPLING = {
    "--observe label=12": "observed.label = 12: is outside 0 … 9",
    "--observe label=three": "observed.label = 'three': write a class id, 0 … 9",
    "--observe label=3 --observe label=4": "--observe = 'label=4': label is observed twice",
    "--observe label": "--observe = 'label': write modality=value",
    "--observe depth=3": "--observe = 'depth=3': no such modality; choose from image, label",
    "--observe image=text.png": "observed.image = 'text.png': cannot be read as an image",
    "--observe image=nowhere.png": "observed.image = 'nowhere.png': no such file",
    "--guidance two": "--guidance = 'two': is no number ≥ 0",
    "--guidance label=2": "guidance_scale.label = 2.0: this modality is not observed",
    "--out grid": "--out = 'grid': is no PNG",
    "--solver EulerScheduler": "solver = 'EulerScheduler': ",
    "--steps 51": "num_inference_steps = 51: ",
}


@pytest.mark.parametrize("arguments", BAD_SAMPLING)
def test_sample_refuses_bad_input(
    cli: Cli, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("colour.png")
    Path("text.png").write_text("no image")
    answer = cli("sample", finished_run, "--num", 2, "--out", "grid.png", *arguments.split())
    assert answer.code == 2
    assert answer.complaint.startswith(BAD_SAMPLING[arguments])
    assert not Path("grid.png").exists()


def test_sample_overwrites_nothing(cli: Cli, finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_text("precious")
    answer = cli("sample", finished_run, "--out", tmp_path / "grid.png")
    assert answer.code == 2 and answer.complaint.startswith(f"--out = '{tmp_path}/grid.png': exists")
    assert (tmp_path / "grid.png").read_text() == "precious"


def test_a_run_without_a_pipeline_is_refused(cli: Cli, run_copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(run_copy / "pipeline")
    for command in (["sample", run_copy, "--out", tmp_path / "grid.png"], ["evaluate", run_copy]):
        answer = cli(*command)
        assert answer.code == 2 and answer.complaint.startswith(f"run = '{run_copy}': holds no finished pipeline")


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["--steps", "3,x"], "--steps = '3,x': write whole numbers"),
        (["--feedback", "mode"], "feedback = 'mode': is wrong with a deterministic solver"),
        (["--solver", "LMS"], "solver = 'LMS': "),
        (["evaluate.num_samples=1"], "evaluate.num_samples = 1: "),
    ],
)
def test_evaluate_refuses_bad_input(cli: Cli, run_copy: Path, arguments: list[str], start: str) -> None:
    answer = cli("evaluate", run_copy, *arguments)
    assert answer.code == 2 and answer.complaint.startswith(start)
    assert not (run_copy / "evaluation.json").exists()


def test_show_opens_data_only_where_a_setting_is_left_to_them(cli: Cli, tiny_file: Path) -> None:
    nowhere = "data.source=no such source"
    assert cli("show", tiny_file, nowhere).complaint.startswith("data.source = 'no such source': cannot be opened")
    answer = cli(
        "show", tiny_file, nowhere, "modalities.image={channels: 1, size: 16}", "modalities.label.num_classes=3"
    )
    assert answer.code == 0, answer.err
    assert re.search(r"^parameters, all +[\d,]+$", answer.out, flags=re.MULTILINE)
    assert not re.search("^rows:", answer.out, flags=re.MULTILINE)


@pytest.mark.parametrize("arguments", ["trian", "train", "sample run --num 0", "sample run --num x", "show x --plt y"])
def test_a_wrong_command_is_one_line(cli: Cli, arguments: str) -> None:
    answer = cli(*arguments.split())
    assert answer.code == 2 and answer.complaint


@pytest.fixture
def bad_row(tmp_path: Path) -> list[str]:
    """Overrides of a source of 7 training rows of which row 4 has the label 7 of 0 … 2; the one epoch meets it."""
    columns = {"image": [Image.new("L", (16, 16))] * 8, "label": [0, 1, 2, 0, 7, 1, 2, 0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
    source = [f"data.source={tmp_path / 'rows.parquet'}", "data.holdout=8", "data.cache_mib=0"]
    return [*source, "modalities.label.num_classes=3", "train.batch_size=1", "train.steps=7"]


def test_a_mistake_found_while_training_is_a_line_of_its_own(cli: Cli, tiny_file: Path, bad_row: list[str]) -> None:
    answer = cli("train", tiny_file, *bad_row)
    assert answer.code == 2 and "Traceback" not in answer.err
    assert answer.err.splitlines()[-1].startswith("mmdiff: data.columns.label=label, row 4 of ")


def test_a_row_that_only_another_process_meets_is_told_too(
    cli: Cli, tiny_file: Path, bad_row: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")  # where a mistake in the config is told by process 0 alone
    assert "label = 7: " in cli("train", tiny_file, *bad_row).err
    assert cli("train", tiny_file, "train.step=5").err == ""


def test_training_that_diverges_is_a_line_of_its_own(cli: Cli, tiny_file: Path) -> None:
    answer = cli("train", tiny_file, "train.learning_rate=1e9", "train.warmup=0")
    assert answer.code == 1 and "Traceback" not in answer.err
    assert answer.err.splitlines()[-1].startswith("mmdiff: step 2: ")


def test_a_real_process_ends_with_code_2_and_our_line(tiny_file: Path) -> None:
    command = [sys.executable, "-m", "mmdiff", "train", str(tiny_file), "train.step=3"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.splitlines() == ["mmdiff: train.step = 3: unknown key; did you mean steps?"]
    assert run.stdout == ""


def test_the_bound_adds_up_in_nats_and_in_bits_per_dimension(cli: Cli, run_copy: Path) -> None:
    assert cli("evaluate", run_copy, "--elbo", "evaluate.num_samples=4").code == 0
    rows = json.loads((run_copy / "evaluation.json").read_text())["rows"]
    nats, bits = ({row["of"]: row["scores"][unit] for row in rows} for unit in ("nats", "bits/dim"))
    assert set(nats) == {"l0", "l1", "l3", "l2/label", "all"}
    assert nats["all"] == pytest.approx(sum(value for name, value in nats.items() if name != "all"))
    for name, value in nats.items():
        assert bits[name] == pytest.approx(value / (16 * 16 * math.log(2)))
