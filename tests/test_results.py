"""The index of experiments and its pages: short, linked, numbers from the JSON files, commands that are read."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from mmdiff.benchmarks.fusion.settings import load_settings
from mmdiff.cli.app import app
from mmdiff.config import load_config

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "experiments" / "README.md"
RESULTS = ROOT / "experiments" / "results"
FAMILIES = sorted(path.stem for path in RESULTS.glob("*.json"))
EXPERIMENTS = sorted(path for path in (ROOT / "experiments").rglob("*.yaml") if "\nname: " in path.read_text())
PAGES = [INDEX, *sorted(RESULTS.glob("*.md"))]
# prints the command that the shell would have called
MMDIFF = "mmdiff() { printf '%q ' \"$@\"; echo; }\n"


def tables(page: Path) -> list[list[list[str]]]:
    """The rows of each table of a page; titles first."""
    found: list[list[list[str]]] = [[]]
    for line in page.read_text().splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip().replace("**", "") for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[rows[0], *rows[2:]] for rows in found if rows]


def commands(page: Path) -> list[list[str]]:
    """What the page's bash blocks call, with loops and variables expanded by bash."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    called = subprocess.run(
        ["bash", "-eu", "-c", MMDIFF + "\n".join(blocks)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [shlex.split(line) for line in called.stdout.splitlines()]


def test_the_index_is_short_and_has_a_verdict_for_every_experiment() -> None:
    assert len(INDEX.read_text().splitlines()) <= 60
    (table,) = tables(INDEX)
    assert table[0] == ["experiment", "claim", "number", "verdict", "page"]
    assert {row[3] for row in table[1:]} == {"met", "tied", "missed", "not measured"}
    named = ", ".join(row[0] for row in table[1:])
    for path in EXPERIMENTS:
        name = path.relative_to(ROOT / "experiments").with_suffix("").as_posix()
        assert name in named or re.sub(r"(cifar10|shapes)_\w+$", r"\1_*", name) in named, name


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_header_is_four_lines(path: Path) -> None:
    text, name = path.read_text(), path.relative_to(ROOT).as_posix()
    header = text[: text.index("\nname: ")].splitlines()
    keys = ["# ", "# command    ", "# results    ", "# measured   "]
    assert [line[: len(key)] for line, key in zip(header, keys, strict=True)] == keys
    assert name in header[1] and f"\nname: {path.stem}\n" in text
    assert (ROOT / header[2].removeprefix(keys[2])).is_file()
    assert re.match(r"machine [A-C], \d{4}-\d\d-\d\d|not measured$", header[3].removeprefix(keys[3]))


def test_links_lead_to_files_and_pictures_are_small_and_drawn_by_the_script(tmp_path: Path) -> None:
    subprocess.run([sys.executable, RESULTS / "plot.py", tmp_path], check=True)
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.stem, target)
            if target.endswith(".png"):
                assert (tmp_path / target).is_file(), target
                assert (page.parent / target).stat().st_size < 60_000, target


@pytest.mark.parametrize("family", FAMILIES)
def test_a_page_has_one_short_table_whose_numbers_are_those_of_the_full_tables(family: str) -> None:
    page = RESULTS / f"{family}.md"
    full = [
        cell for table in json.loads((RESULTS / f"{family}.json").read_text()) for row in table["rows"] for cell in row
    ]
    assert "**Claim.**" in page.read_text() and f"({family}.json)" in page.read_text()
    (table,) = tables(page)
    assert len(table) <= 11
    for row in table[1:]:
        for cell in row[1:]:
            assert not re.search(r"\d", cell) or any(cell in other for other in full), cell


def test_full_tables_say_how_they_were_made() -> None:
    for family in FAMILIES:
        for table in json.loads((RESULTS / f"{family}.json").read_text()):
            assert list(table) == ["table", "command", "machine", "date", "protocol", "columns", "rows"], family
            assert f"| {table['machine']} |" in (RESULTS / "protocol.md").read_text(), family
            assert re.fullmatch(r"2\d{3}-\d\d-\d\d", table["date"]), family
            assert all(len(row) == len(table["columns"]) for row in table["rows"]), family


def experiment_of(command: list[str]) -> Path:
    """The YAML file of a command, or of the run that it names."""
    files = [ROOT / text for text in command if text.endswith(".yaml")]
    runs = [Path(text).name for text in command if text.startswith("runs/")]
    named = [path for path in EXPERIMENTS for run in runs if run.startswith(path.stem)]
    return [*files, *named, ROOT / "experiments" / "digits.yaml"][0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_read_by_the_command_line(page: Path) -> None:
    for command in commands(page):
        group, rest = typer.main.get_command(app), command
        while hasattr(group, "commands"):
            group, rest = group.commands[rest[0]], rest[1:]
        group.make_context("mmdiff", list(rest))  # it empties its list
        path = experiment_of(command)
        read = load_settings if "\nlearner: " in path.read_text() else load_config
        read(path, [text for text in rest if re.match(r"[\w.]+=", text)])
