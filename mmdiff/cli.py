"""The command line: train, sample, evaluate, benchmark, show. Heavy imports wait until a command runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdiff.arguments import ConfigPath, Overrides, RunPath, Trust, echo, integers
from mmdiff.benchmarks import benchmark
from mmdiff.errors import printable
from mmdiff.strangers import check_links, refuse_custom, stay_offline

if TYPE_CHECKING:
    from mmdiff.config import Config, SampleConfig

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Multimodal, multitask diffusion: one model for several kinds of data at once.",
)  # fmt: skip
app.add_typer(benchmark, name="benchmark")


def _version(asked: bool) -> None:
    if asked:
        from mmdiff import __version__

        typer.echo(f"mmdiff {__version__}")
        raise typer.Exit


@app.callback()
def _everything(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    """Multimodal, multitask diffusion: one model for several kinds of data at once."""


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="two steps on stand-in data, and their cost")] = False,
    trust: Trust = False,
) -> None:
    """Train an experiment; also under `accelerate launch -m mmdiff train …` and torchrun."""
    from mmdiff.config import load_config

    loaded = load_config(config, overrides)
    if dry_run:
        from mmdiff.training.dry_run import dry_run as run_dry

        report = run_dry(loaded)
        if _is_main():
            echo(report)
        return
    from mmdiff.training import train as run_training

    folder = run_training(loaded, trust_custom_modalities=trust)
    if _is_main() and (folder / "pipeline").is_dir():
        echo(f"pipeline: {folder / 'pipeline'}\nsamples: {folder / 'samples' / f'step-{loaded.train.steps}.png'}")
        if loaded.evaluate.at_end:
            _evaluate(folder, [], (), None, None, trust=True, trust_judges=trust)  # the run is one's own, judges not


@app.command("sample")
def sample_(
    run: RunPath,
    observe: Annotated[
        list[str] | None,
        typer.Option(
            help="modality=value; may be repeated: label=3 or label=NAME, image=photo.png, mask=ids.png, "
            "masked_image=photo.png@mask.png (white is known, black the hole; or one image with an alpha channel), "
            "embedding=vec.npy; images of another size are cut to their centre and resized"
        ),
    ] = None,
    num: Annotated[int, typer.Option(help="how many samples", min=1)] = 64,
    steps: Annotated[int | None, typer.Option(help="solver steps; default: the run's sample.steps", min=1)] = None,
    guidance: Annotated[
        str | None, typer.Option(help="2, or label=2,embedding=1.5; default: the run's sample.guidance_scale")
    ] = None,
    conditioning: Annotated[
        str | None,
        typer.Option(help="how observed values steer: channels, plug-in, self-guidance, replacement, or several"),
    ] = None,
    aggregate: Annotated[str | None, typer.Option(help="what enters z_t: all, none, or names with commas")] = None,
    solver: Annotated[str | None, typer.Option(help="another solver than the run's")] = None,
    feed: Annotated[str | None, typer.Option(help="unknown modalities: draw, mean or mode")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="samples that are computed at once; default: the run's sample.batch_size", min=1)
    ] = None,
    dtype: Annotated[str, typer.Option(help="precision of the networks: fp32 or bf16")] = "fp32",
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile the backbone first")] = False,
    seed: Annotated[int, typer.Option(help="sample k depends on the seed and on k alone", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="the grid, a PNG that must not exist")] = Path("grid.png"),
    save_each: Annotated[
        Path | None, typer.Option(help="a new folder: one file per modality and sample, which --observe reads back")
    ] = None,
    trust: Trust = False,
) -> None:
    """Sample from a run and write a grid."""
    _read_only(trust)
    own = _sample_config(run)
    from mmdiff.sampling import load, prepare, sample

    pipeline = load(run, solver, trust)
    prepare(pipeline, dtype, compiled)
    settings = {
        "num_inference_steps": steps or own.steps,
        "feed": own.feed if feed is None else feed,
        "max_batch_size": batch_size or own.batch_size,
    }
    if conditioning is not None:
        settings["conditioning"] = conditioning.split(",")
    if aggregate is not None:
        settings["aggregate"] = {"all": True, "none": False}.get(aggregate, aggregate.split(","))
    scales = own.scales if guidance is None else guidance
    for line in sample(pipeline, observe or [], num, seed, out, save_each, scales, settings):
        echo(line)


@app.command("check-modality")
def check_modality(
    kind: Annotated[str, typer.Argument(help="a modality of your own by import path, my_pkg.depth:Depth, or a kind")],
    settings: Annotated[list[str] | None, typer.Argument(help="its settings as key=value, for example size=32")] = None,
    space: Annotated[str, typer.Option(help="the diffusion space, channels,height,width")] = "3,16,16",
) -> None:
    """Run the contract of a modality and say in words what fails; exit code 1 where something does."""
    from mmdiff.config import parse_overrides
    from mmdiff.config.tree import plain
    from mmdiff.errors import InputError

    chosen, numbers = plain("settings", parse_overrides(settings or [])), integers("--space", space)
    if len(numbers) != 3 or min(numbers) < 1 or numbers[1] % 2 or numbers[2] % 2:
        raise InputError("--space", space, "write channels,height,width, the sides even: 3,16,16")
    from mmdiff.modalities import Shape, contract, find_modality
    from mmdiff.resolve import check_settings

    modality = find_modality(kind, "modality")
    check_settings("settings", modality, chosen)
    shape = Shape(numbers, features=8, pooled=12, stride=2)
    findings = contract.check_modality(lambda shape: modality(shape, **chosen), shape)
    for law, fault in findings:
        echo(f"{'ok  ' if fault is None else 'FAIL'}  {law}" + (f": {fault}" if fault else ""))
    if any(fault for _, fault in findings):
        raise typer.Exit(1)


@app.command()
def evaluate(
    run: RunPath,
    overrides: Overrides = None,
    steps: Annotated[str | None, typer.Option(help="numbers of solver steps to compare: 10,20,200")] = None,
    solver: Annotated[str | None, typer.Option(help="another solver than the run's")] = None,
    feed: Annotated[str | None, typer.Option(help="unknown modalities: draw, mean or mode")] = None,
    conditioning: Annotated[
        str | None, typer.Option(help="ways to compare: channels,plug-in,self-guidance,replacement,channels+plug-in …")
    ] = None,
    subsets: Annotated[
        bool, typer.Option("--subsets", help="score every subset of observed modalities instead")
    ] = False,
    trust: Trust = False,
) -> None:
    """Score every modality and direction of a run; writes evaluation.json and prints the table."""
    _read_only(trust)
    ways = tuple(conditioning.split(",")) if conditioning else ()
    _evaluate(run, overrides or [], integers("--steps", steps), solver, feed, trust, trust, ways, subsets)


@app.command()
def show(
    config: ConfigPath,
    overrides: Overrides = None,
    plot: Annotated[Path | None, typer.Option(help="write the weight schedules as a PNG")] = None,
    trust: Trust = False,
) -> None:
    """The resolved config, parameter counts and weight schedules of an experiment."""
    from mmdiff.config import load_config

    _read_only(trust)
    loaded = load_config(config, overrides)
    if not trust:
        refuse_custom(loaded.model_dump()["modalities"])
    from mmdiff.build import build_model, build_scheduler, open_rows
    from mmdiff.report import describe
    from mmdiff.resolve import needs_data, resolve

    splits = open_rows(loaded) if needs_data(loaded) else None
    resolved = resolve(loaded, splits[0] if splits else None)
    scheduler = build_scheduler(resolved)
    echo(describe(resolved, build_model(resolved, initial_weights=False), scheduler, splits))
    if plot is not None:
        from mmdiff.plots import weight_schedules

        echo(f"wrote {weight_schedules(scheduler, plot)}")


def main() -> None:
    """The entry point: one line and exit code 2 for bad input, 1 for training that cannot go on."""
    _set_wait_policy()
    from mmdiff.errors import InputError, TrainingError

    # typer brings a click of its own in some versions: take the class from typer, whichever it is
    usage_error = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")

    try:
        code = app(standalone_mode=False)
    except InputError as error:
        _fail(str(error), 2, everywhere=error.everywhere)
    except usage_error as error:
        _fail(error.format_message(), 2)
    except typer.Abort:
        _fail("interrupted", 130)
    except TrainingError as error:
        _fail(str(error), 1)
    else:
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
    if _is_main() or not everywhere:
        sys.stdout.flush()
        print(f"mmdiff: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)
    sys.exit(code)


def _read_only(trust: bool) -> None:
    """What is read may be a stranger's: nobody is contacted for it."""
    if not trust:
        stay_offline()


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _evaluate(
    run: Path,
    overrides: list[str],
    steps: tuple[int, ...],
    solver: str | None,
    feed: str | None,
    trust: bool,
    trust_judges: bool,
    conditioning: tuple[str, ...] = (),
    subsets: bool = False,
) -> None:
    from mmdiff.config import load_config

    check_links("run", run)
    config: Config = load_config(run / "config.yaml", overrides)
    if not trust:
        refuse_custom(config.model_dump()["modalities"])
    from mmdiff.build import build_table, open_rows
    from mmdiff.evaluation import evaluators, records
    from mmdiff.plots import side_by_side
    from mmdiff.sampling import load

    records.read(run / "evaluation.json")  # a broken one is named before the work
    pipeline = load(run, solver, trust)
    train, validation = (build_table(config, pipeline.model, rows) for rows in open_rows(config, hub=trust))
    result = evaluators.evaluate(pipeline, config, train, validation, steps, feed, trust_judges, conditioning, subsets)
    records.save(result, run / "evaluation.json")
    echo(records.table(result))
    for name, rows in result.pictures.items():
        echo(f"wrote {side_by_side(rows, run / 'samples' / f'evaluation-{name}.png')}")


def _sample_config(run: Path) -> SampleConfig:
    """The run's own `sample` settings; a bare pipeline folder has none."""
    from mmdiff.config import SampleConfig, load_config

    return load_config(run / "config.yaml").sample if (run / "config.yaml").is_file() else SampleConfig()
