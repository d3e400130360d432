"""The README: its first command runs as a real process in a folder with the experiments, then all of its blocks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, TOY, blocks, run_page

README = ROOT / "README.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's first command has been run."""
    folder = tmp_path_factory.mktemp("fresh")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    install, launch = blocks(README.read_text())[0].text.strip().split(" && ")
    assert install == "pip install -e ."
    program, *arguments = launch.split()
    toy = [f"{key}={value}".replace(" ", "") for key, value in TOY.items() if key != "evaluate.at_end"]
    program = str(Path(sys.executable).parent / program)
    done = subprocess.run([program, *arguments, *toy], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "agreement" in done.stdout and "image → label" in done.stdout
    return folder


def test_the_first_command_leaves_what_it_promises(folder: Path) -> None:
    run = folder / "runs" / "digits"
    assert (run / "pipeline" / "model_index.json").is_file()
    assert list((run / "samples").glob("*.png")) and (run / "curves.png").is_file()
    assert (run / "metrics.jsonl").read_text().count("\n") >= 1
    assert (run / "evaluation.json").is_file() and list((run / "checkpoints").glob("step-*"))


def test_its_blocks_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    run_page(README, monkeypatch)


def test_it_is_short_and_its_installation_is_that_of_ci() -> None:
    text, ci = README.read_text(), (ROOT / ".ci" / "run").read_text()
    assert len(text.splitlines()) <= 150
    assert 'pip install -e ".[test]" && pytest -n 2 --dist loadfile' in text
    assert 'pip install -e "\\.\\[test\\]"' in ci


def test_the_numbers_of_its_table_are_those_of_the_pages() -> None:
    rows = re.findall(r"^\| (.*?) \| (.*) \| (.*) \|$", README.read_text(), flags=re.MULTILINE)[1:]
    assert len(rows) > 10
    page = ""
    for ability, score, size in rows:
        if linked := re.search(r"\]\((.*)\.md\)", ability):  # rows without a link belong to the page above
            page = "".join((ROOT / f"{linked[1]}{ending}").read_text() for ending in (".md", ".json"))
        numbers = re.findall(r"\d(?: ?\d)*(?:\.\d+)?", f"{score} {size}") if "tests/" not in score else []
        assert [number for number in numbers if number not in page] == [] or "not measured" in score, ability
