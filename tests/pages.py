"""Pages of Markdown: commands run in process at toy size, Python in order; files are written, YAML is checked."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from mmdiff.cli.app import main
from mmdiff.config import Config

ROOT = Path(__file__).parents[1]
NOT_TESTED = "not run by the tests: "  # begins the title of a block that cannot run here; the reason follows
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHOWN = ("text", "math", "bibtex")  # languages of blocks that nobody runs
TOY = {
    "train.steps": 2,
    "train.batch_size": 8,
    "backbone.block_out_channels": [8, 16],
    "backbone.norm_num_groups": 4,
    "backbone.attention_head_dim": 8,
    "scheduler.num_train_timesteps": 50,
    "evaluate.num_samples": 16,
    "evaluate.at_end": False,
    "sample.steps": 2,
}
TOY_ROWS = {"data.options.rows": 64, "data.options.validation_rows": 16}  # of generated data
TOY_FUSION = {
    "seeds": 2,
    "pretraining.steps": 1,
    "training.steps": 1,
    "test.rows": 4,
    "test.views": [1, 2],
    "test.distractors": [0.0],
}


class Block(NamedTuple):
    """A fenced block: ``title`` is a file's name, or says why the block is not tested."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, also in indented ones such as admonitions."""
    found = []
    for match in re.finditer(r"^( *)```(\w*)(.*)\n((?:.*\n)*?)\1```$", page, flags=re.MULTILINE):
        indent, language, rest, text = match.groups()
        title = re.search(r'title="([^"]*)"', rest)
        plain = re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)
        line = page[: match.start()].count("\n") + 1
        found.append(Block(language, title[1] if title else "", plain, line))
    return found


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, comments left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]


def run_page(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run every block of a page in the working directory, in order; the names that its Python leaves."""
    monkeypatch.syspath_prepend(str(Path.cwd()))
    names: dict[str, Any] = {}
    for block in blocks(path.read_text(encoding="utf-8")):
        if block.title.startswith(NOT_TESTED) or block.language in SHOWN:
            continue
        try:
            _RUN[block.language](block, names, monkeypatch)
        except BaseException as error:
            error.add_note(f"in the block at {path.name}:{block.line}")
            raise
    return names


def _run_shell(block: Block, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands(block.text):
        if command[:3] == ["pip", "install", "-e"]:
            extras = re.findall(r"\w+", command[3])
            assert command[3].startswith(".") and set(extras) <= set(PROJECT["optional-dependencies"]), command
            continue
        assert command[0] == "mmdiff", f"{command[0]} is neither run nor marked `{NOT_TESTED}REASON`"
        monkeypatch.setattr(sys, "argv", [*command, *toy_settings(command)])
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, " ".join(command)


def toy_settings(command: list[str]) -> list[str]:
    """What makes a training or a benchmark of a YAML file small."""
    file = next((Path(part) for part in command if part.endswith(".yaml")), None)
    if command[1] not in ("train", "benchmark") or file is None:
        return []
    rows = TOY_ROWS if yaml.safe_load(file.read_text())["data"]["source"] == "shapes" else {}
    sizes = TOY_FUSION if command[2] == "fusion" else TOY
    backbone = yaml.safe_load(file.read_text()).get("backbone") or {}
    if "initialize_from" in backbone:  # of another size
        sizes = {key: value for key, value in sizes.items() if not key.startswith(("backbone.", "scheduler."))}
    elif backbone.get("kind", "unet") != "unet":  # no levels
        sizes = {key: value for key, value in sizes.items() if not key.startswith("backbone.")}
    return [f"{key}={value}" for key, value in {**sizes, **rows}.items()]


def _run_python(block: Block, names: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    if block.title:
        Path(block.title).write_text(block.text, encoding="utf-8")
    else:
        exec(compile(block.text, f"block at line {block.line}", "exec"), names)


def _run_yaml(block: Block, names: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    tree = yaml.safe_load(block.text)
    if block.title:
        Path(block.title).write_text(block.text, encoding="utf-8")
    else:  # a part of a config: its keys and values must fit
        whole = {"name": "part", "data": {"source": "digits"}, "modalities": {"image": {"kind": "image"}}}
        Config.model_validate({**whole, **tree, "data": {**whole["data"], **tree.get("data", {})}})


_RUN = {"bash": _run_shell, "python": _run_python, "yaml": _run_yaml}
