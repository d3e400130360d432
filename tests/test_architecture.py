"""Modules import lower layers only, files stay small, cited equations exist, and the command line needs no torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mmdiff"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 300, 60
LAYERS = {
    **dict.fromkeys(("errors", "randomness", "likelihoods", "config", "slots", "trust", "states"), 0),
    **dict.fromkeys(("values", "image_files", "clip", "augmentation"), 0),
    **dict.fromkeys(("data", "lora", "modalities", "schedulers", "backbones", "losses", "metrics"), 1),
    **dict.fromkeys(("model", "observation", "vlm", "alignment"), 2),
    **dict.fromkeys(("objective", "own_times", "sampling"), 3),
    **dict.fromkeys(("pipeline", "plots", "grids", "resolve", "sizes", "build", "pretrained"), 4),
    "encoded": 4,
    "encode": 6,
    **dict.fromkeys(("training", "evaluation", "runs"), 5),
    "benchmarks": 6,
    "cli": 7,
    **dict.fromkeys(("__main__", "__init__"), 8),
}


def name_of(path: Path) -> str:
    """mmdiff/data/digits.py -> "data.digits", mmdiff/data/__init__.py -> "data"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it; the package's root is left out."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in inner if name.removeprefix("mmdiff.") in MODULES}
            found |= submodules or {str(node.module)}
    inside = {name.removeprefix("mmdiff.") for name in found if name.startswith("mmdiff.")}
    assert inside <= set(MODULES), f"{path}: {inside - set(MODULES)}"
    return inside


def room_of(module: str) -> str:
    """The unit that has a layer: a file or a package at the top."""
    return module.split(".")[0]


GRAPH = {name: imports_of(path) for name, path in MODULES.items()}


def test_imports_run_downwards_and_neighbours_of_layer_1_do_not_know_one_another() -> None:
    wrong = []
    for module, others in GRAPH.items():
        own = room_of(module)
        for other in {room_of(other) for other in others} - {own}:
            if LAYERS[other] > LAYERS[own] or LAYERS[other] == LAYERS[own] == 1:
                wrong.append(f"{module} imports {other}")
    assert wrong == [] and max(LAYERS.values()) < 10


def test_imports_have_no_cycle() -> None:
    TopologicalSorter({name: others - {name} for name, others in GRAPH.items()}).prepare()  # raises CycleError


def lines_of(function: ast.FunctionDef) -> int:
    """Without the docstring."""
    first = function.body[0]
    text = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) is not None else 0
    return function.end_lineno - function.lineno + 1 - text


def test_files_and_functions_are_small_and_named_for_what_they_hold() -> None:
    assert {name: n for name, p in MODULES.items() if (n := len(p.read_text().splitlines())) > LONGEST_FILE} == {}
    nodes = [(name, node) for name, path in MODULES.items() for node in ast.walk(ast.parse(path.read_text()))]
    functions = {f"{name}.{node.name}": lines_of(node) for name, node in nodes if isinstance(node, ast.FunctionDef)}
    assert {name: n for name, n in functions.items() if n > LONGEST_FUNCTION} == {}
    assert [name for name in MODULES if re.search("util|misc|helper|common", name)] == []


def test_every_equation_cited_is_in_the_theory() -> None:
    cited = {}
    for path in FILES:
        for group in re.findall(r"Eq\.\s+((?:\(\d[\d, ]*\)(?:\s*(?:,|and|–|to)\s*)?)+)", path.read_text()):
            cited |= dict.fromkeys(re.findall(r"\d+", group), name_of(path))
    assert len(cited) >= 8
    theory = (ROOT / "docs" / "theory.md").read_text()
    assert [number for number in cited if f"\\tag{{{number}}}" not in theory] == []


def test_the_command_line_starts_without_torch_and_lists_its_commands() -> None:
    code = "import sys, mmdiff.cli.app; print([m for m in ('torch', 'diffusers', 'datasets') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    shown = subprocess.run([sys.executable, "-m", "mmdiff", "--help"], capture_output=True, text=True, check=True)
    listed = re.findall(r"^  (\w+) ", shown.stdout, flags=re.MULTILINE)
    assert {"train", "sample", "evaluate", "benchmark", "show"} <= set(listed)


def test_importing_the_pipeline_imports_no_more_packages_than_diffusers_pipelines_do() -> None:
    """`datasets` alone would cost half a second; `transformers` comes with diffusers' pipelines."""
    code = (
        "import sys; from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DModel; before = set(sys.modules);"
        "from mmdiff import MTDiffusionPipeline; print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {
        "datasets",
        "transformers",
        "pandas",
        "pyarrow",
        "scipy",
        "sklearn",
        "matplotlib",
        "open_clip",
        "torchvision",
    }
    assert heavy & set(run.stdout.split()) == set()
