"""mkdocs: the generated page, and equations as MathML."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]
import configuration  # noqa: E402

_LETTERS = {("script", "N"): "𝒩", ("double-struck", "E"): "𝔼", ("double-struck", "R"): "ℝ"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Blocks ```math become MathML: no script, no request to another server. Every page of results is in the menu."""
    fence = {"name": "math", "class": "math", "format": equation}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    pages = [_source(path) for path in sorted(RESULTS.glob("*.md"))]
    next(entry for entry in config.nav or [] if "Results" in entry)["Results"] = ["experiments/README.md", *pages]
    return config


def _source(path: Path) -> str:
    """The name on the site of a file beside docs/."""
    return path.relative_to(ROOT).as_posix()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the configuration, read from the schema, and the results, which stand beside their experiments."""
    files.append(File.generated(config, "configuration.md", content=configuration.page()))
    for path in sorted(RESULTS.parent.rglob("*")):
        if path.suffix in (".md", ".png", ".json", ".yaml"):
            files.append(File.generated(config, _source(path), abs_src_path=str(path)))
    return files


def equation(source: str, *_: Any, **__: Any) -> str:
    """LaTeX of one equation, its number in \\tag, as a line with the number at the right."""
    number = re.search(r"\\tag\{(\w+)\}", source)
    formula = mathml(re.sub(r"\\tag\{\w+\}", "", source).strip(), display="block")
    label = f'<a class="number" id="eq-{number[1]}" href="#eq-{number[1]}">({number[1]})</a>' if number else ""
    return f'<div class="equation" title="{html.escape(source.strip())}">{formula}{label}</div>'


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links as they are on the site; symbols between dollar signs become MathML, outside of code."""
    markdown = markdown.replace("](../experiments/", "](experiments/").replace("../docs/", "../")
    markdown = re.sub(r"\[([^]]+)\]\(results\)", r"\1", markdown)  # a folder is no page
    parts = re.split(r"(^ *```.*?^ *```$|`[^`\n]*`)", markdown, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [re.sub(r"\$([^$\n]+)\$([.,;:)]?)", _inline, part) for part in parts[::2]]
    return "".join(parts)


def _inline(found: re.Match[str]) -> str:
    # a line that begins with <math would be taken for a block; the sign after it stays on its line
    return f'<span class="symbol">{mathml(found[1])}{found[2]}</span>'


def mathml(source: str, display: str = "inline") -> str:
    """LaTeX as MathML."""
    found = convert(source, display=display)
    for (variant, letter), sign in _LETTERS.items():
        found = found.replace(f'<mi mathvariant="{variant}">{letter}</mi>', f"<mi>{sign}</mi>")
    return found
