"""The documentation: blocks run, links lead somewhere, equations are numbered, every setting has a meaning."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from pages import ROOT, blocks, run_page

from mmdiff.cli.app import app

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FIRST = DOCS / "quickstart.md"  # leaves the run that the other pages use


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the quickstart was followed."""
    folder = tmp_path_factory.mktemp("quickstart")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        run_page(FIRST, monkeypatch)
    return folder


def test_the_quickstart_leaves_a_run(trained: Path) -> None:
    run = trained / "runs" / "digits"
    assert (run / "pipeline" / "model_index.json").is_file()
    assert list((run / "samples").glob("*.png")) and (run / "evaluation.json").is_file()


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if page != FIRST], ids=lambda page: page.stem)
def test_a_page_runs(page: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(trained, tmp_path / "folder")
    monkeypatch.chdir(folder)
    run_page(page, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_are_there(page: Path) -> None:
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    generated = {"configuration.md"}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#")) and target.partition("#")[0] not in generated:
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_option_that_a_page_names_is_one_of_the_command_line() -> None:
    named = {option for page in PAGES for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text())}
    launchers = {"--cpu", "--num_processes", "--nproc_per_node", "--config_file", "--num_machines", "--machine_rank"}
    launchers |= {"--main_process_ip", "--main_process_port", "--nnodes"}
    launchers |= {"--rdzv_backend", "--rdzv_endpoint", "--rdzv_id"}
    slurm = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--requeue", "--kill-on-bad-exit"}
    foreign = {"--dist"} | launchers | slurm  # of pytest, accelerate, torchrun and Slurm
    assert named - foreign <= set(options_of(typer.main.get_command(app)))


def test_the_commands_of_the_help_are_those_of_the_first_page() -> None:
    text = typer.main.get_command(app).help or ""
    commands = re.findall(r"^  mmdiff (?:.*\\\n)?.*$", text, flags=re.MULTILINE)
    assert len(commands) == 2
    page = " ".join((DOCS / "index.md").read_text().replace("\\\n", "").split())
    assert all(" ".join(command.replace("\\\n", "").split()) in page for command in commands)


def options_of(command: Any) -> Iterator[str]:
    """The options of a command and of those below it."""
    for parameter in command.params:
        yield from [*parameter.opts, *parameter.secondary_opts]
    for inner in getattr(command, "commands", {}).values():
        yield from options_of(inner)


def test_every_equation_is_numbered_once_and_in_order() -> None:
    tags = [re.search(r"\\tag\{(\d+)\}", block.text) for block in blocks((DOCS / "theory.md").read_text())]
    numbers = [int(tag[1]) for tag in tags if tag]
    assert len(numbers) >= 20 and numbers == list(range(1, len(numbers) + 1))


def test_the_tests_that_the_pages_name_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", page.read_text())}
    assert named
    for name in named:
        file, _, function = name.partition("::")
        assert (ROOT / file).is_file() and f"def {function}" in (ROOT / file).read_text(), name


@pytest.mark.parametrize("page", ["architecture", "modalities", "sampling", "training", "image-sets"])
def test_names_of_the_code_that_a_page_uses_are_there(page: str) -> None:
    """Identifiers and dotted names in backticks: each part stands somewhere in the source or an experiment."""
    source = "\n".join(path.read_text() for path in [*ROOT.glob("mmdiff/**/*.py"), *ROOT.glob("experiments/**/*.yaml")])
    words = set(re.findall(r"\w+", source)) | {"torch", "modalities"}
    text = re.sub(r"^( *)```.*?^\1```$", "", (DOCS / f"{page}.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    quoted = [name for name in re.findall(r"`([A-Za-z_][\w.]*)[(`]", text) if not name.isupper()]
    assert len(quoted) > 10
    assert [name for name in quoted if not set(name.split(".")) <= words | {"py", "json", "jsonl", "yaml"}] == []


def test_what_the_page_on_the_api_lists_is_there() -> None:
    griffe = pytest.importorskip("griffe", reason="needs the extra docs")
    package = griffe.load("mmdiff", search_paths=[ROOT], submodules=True)
    listed = re.findall(
        r"^::: mmdiff\.([\w.]+)(?:\n +options: \{members: \[([^]]*)\])?", (DOCS / "api.md").read_text(), re.M
    )
    assert len(listed) > 10
    for path, members in listed:
        for member in filter(None, members.split(", ")):
            assert member in package[path].all_members or member in package[path].members, f"{path}.{member}"
        assert package[path].docstring, path


@pytest.fixture(scope="module")
def configuration() -> ModuleType:
    """The script that writes the page on configuration."""
    pytest.importorskip("griffe", reason="needs the extra docs")
    spec = importlib.util.spec_from_file_location("configuration", DOCS / "site" / "configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_setting_of_the_schema_has_a_meaning(configuration: ModuleType) -> None:
    settings = configuration.every_key()
    assert len(settings) > 80
    assert [setting.key for setting in settings if not setting.meaning] == []


def test_the_page_on_configuration_lists_classes_types_and_defaults(configuration: ModuleType) -> None:
    page = configuration.page()
    for line in (
        "| `train.min_learning_rate` | float, ≥ 0 | `0.0` |",
        "| `loss.weighting` | `fixed` / `learned` | `fixed` |",
        "### `kind: label`",
        "### `kind: unet`",
        "| `table_size` | int or none | – |",
    ):
        assert line in page
