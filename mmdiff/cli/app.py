"""The entry point: the commands, and one line for every error. Heavy imports wait until a command runs."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from mmdiff.cli.benchmark import benchmark
from mmdiff.cli.check_modality import check_modality
from mmdiff.cli.ema import ema
from mmdiff.cli.encode import encode
from mmdiff.cli.evaluate import evaluate
from mmdiff.cli.options import is_main
from mmdiff.cli.sample import sample
from mmdiff.cli.show import show
from mmdiff.cli.train import train
from mmdiff.errors import printable

_INTERRUPTED = 130
_OF_THE_DISK = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_HELP = """Train one diffusion model on images and what belongs to them: labels, masks, depth maps, embeddings, tables,
several photos of one object. Give any subset of these modalities, and the model draws the rest.

It is for those who know PyTorch and diffusers, and train a model of their own.

\b
To train on a folder of yours, with one sub-folder per class (pets/cat/1.jpg, …):
  mmdiff train experiments/digits.yaml name=pets data.source=pets \\
      data.holdout=10 modalities.image.size=32 modalities.image.resize=true
  mmdiff sample runs/pets --observe label=cat --num 16 --out cats.png

\b
Photos with masks, tables, archives, hub data sets: docs/your-data.md
All settings of an experiment: mmdiff show experiments/digits.yaml
"""
app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help=_HELP,
)  # fmt: skip
for command in (train, encode, sample, evaluate, ema, show):
    app.command()(command)
app.command("check-modality")(check_modality)
app.add_typer(benchmark, name="benchmark")


def _version(asked: bool) -> None:
    if asked:
        from mmdiff import __version__

        typer.echo(f"mmdiff {__version__}")
        raise typer.Exit


@app.callback()
def _everything(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version, and stop")
    ] = False,
) -> None:
    """Options of the program itself."""


def main() -> None:
    """The entry point: one line and exit code 2 for bad input, 1 for training that cannot go on."""
    _set_wait_policy()
    if "WORLD_SIZE" in os.environ:  # a process that is lost is one line, without torch's own traces
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from mmdiff.errors import InputError, TrainingError

    # typer brings a click of its own in some versions: take the class from typer, whichever it is
    usage_error = typer.BadParameter.__base__

    try:
        code = app(standalone_mode=False)
    except InputError as error:
        _fail(str(error), 2, everywhere=error.everywhere)
    except usage_error as error:
        _fail(error.format_message(), 2)
    except typer.Abort:
        _fail("interrupted", _INTERRUPTED)
    except TrainingError as error:
        _fail(str(error), 1, everywhere=error.everywhere)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        _fail(f"{error.filename or 'a file'}: {os.strerror(error.errno)}; give leave or room, or name another path", 1)
    else:
        if code == _INTERRUPTED:
            _fail("interrupted", code)  # newer typers say nothing
        if code:
            sys.exit(code)


def _set_wait_policy() -> None:
    """How OpenMP threads wait for one another; must be set before torch is imported.

    Sleeping costs 1.7× the time of a small training step on a quiet machine, spinning 3× and more on a busy one.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if hasattr(os, "getloadavg") and os.getloadavg()[0] < 0.75 * cores and "WORLD_SIZE" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = "30000"  # some 0.1 ms, then sleep
    else:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _fail(message: str, code: int, everywhere: bool = True) -> None:
    """One line, from one process where all of them say the same."""
    if is_main() or not everywhere:
        sys.stdout.flush()
        print(f"mmdiff: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)
    sys.exit(code)
