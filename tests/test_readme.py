"""The README's commands and code run, in its order, in a folder that holds nothing but the experiments."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmdiff.cli.app import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TOY = [
    "train.steps=2",
    "train.batch_size=8",
    "backbone.block_out_channels=[8,16]",
    "backbone.norm_num_groups=4",
    "backbone.attention_head_dim=8",
    "scheduler.num_train_timesteps=50",
    "evaluate.num_samples=16",
    "sample.steps=2",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(program: str) -> list[list[str]]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith(program)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's first command has been run, as a real process."""
    folder = tmp_path_factory.mktemp("fresh")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    install, launch = blocks("bash")[0].strip().split(" && ")
    assert install == "pip install -e ."
    program, *arguments = shlex.split(launch)
    program = str(Path(sys.executable).parent / program)
    done = subprocess.run([program, *arguments, *TOY], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "agreement" in done.stdout and "image → label" in done.stdout
    return folder


def test_the_first_command_leaves_what_it_promises(folder: Path) -> None:
    run = folder / "runs" / "digits"
    assert (run / "pipeline" / "model_index.json").is_file()
    assert list((run / "samples").glob("*.png"))
    assert (run / "metrics.jsonl").read_text().count("\n") >= 1
    assert (run / "evaluation.json").is_file()


RUNNABLE = [command for command in commands("mmdiff") if "path/or/hub-name" not in " ".join(command)]


@pytest.mark.parametrize("command", RUNNABLE, ids=" ".join)
def test_a_command_runs(
    command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    toy = [*TOY, "data.options.rows=64", "data.options.validation_rows=16"] if command[1] == "train" else []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [*command, *toy])
    main()
    assert capsys.readouterr().out


def test_the_python_code_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["read"][0] in range(10)
    assert names["pipe"].scheduler.config.solver == "DDIMScheduler"


def test_the_two_installation_commands_are_those_of_ci() -> None:
    assert 'pip install -e ".[test]" && pytest -n 2 --dist loadfile' in README
    assert 'pip install -e "\\.\\[test\\]"' in (ROOT / ".ci" / "run").read_text()


def test_every_equation_is_stated_once() -> None:
    theory = README[README.index("## Theory") :]
    for number in range(1, 17):
        assert len(re.findall(rf"^\({number}\)\s", theory, flags=re.MULTILINE)) == 1
