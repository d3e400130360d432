"""Arguments that several commands take, and numbers that a person types with commas."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mmdiff.errors import InputError, printable
from mmdiff.trust import stay_offline

Overrides = Annotated[list[str] | None, typer.Argument(help="settings that replace those of the file: train.steps=600")]
ConfigPath = Annotated[Path, typer.Argument(help="an experiment: experiments/digits.yaml")]
RunPath = Annotated[Path, typer.Argument(help="a run folder: runs/digits")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-custom-modalities",
        help="run code that a config, a run or its judges name, and contact the hub; only for files that you trust",
    ),
]


def echo(text: str) -> None:
    """Print; control characters other than line breaks are written out, as names in it may be a stranger's."""
    typer.echo(printable(text, keep="\n\t"))


def is_main() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def read_only(trust: bool) -> None:
    """What is read may be a stranger's: nobody is contacted for it."""
    if not trust:
        stay_offline()


def integers(key: str, text: str | None) -> tuple[int, ...]:
    """ "10,20,200" -> (10, 20, 200); nothing -> ().

    Raises:
        InputError: naming the option.
    """
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InputError(key, text, "write whole numbers with commas: 10,20,200") from None


def numbers(key: str, text: str) -> tuple[float, ...]:
    """ "0.25,0.5" -> (0.25, 0.5).

    Raises:
        InputError: naming the option.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(key, text, "write numbers with commas: 0.25,0.5") from None


def files_and_overrides(key: str, texts: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files, and settings as key=value; a file's name may have an equals sign.

    Raises:
        InputError: no file is named.
    """
    files = tuple(text for text in texts if "=" not in text or Path(text).exists())
    if not files:
        raise InputError(key, None, "name an experiment's YAML file, or a run folder where the command takes runs")
    return files, tuple(text for text in texts if text not in files)
