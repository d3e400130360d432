"""`mmdiff benchmark …`: its commands. Heavy imports wait until one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmdiff.cli.options import ConfigPath, Overrides, Trust, echo, files_and_overrides, integers, numbers, read_only
from mmdiff.errors import InputError

benchmark = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Compare methods on the same data.")


@benchmark.command()
def speed(
    configs: Annotated[list[str], typer.Argument(help="YAML files of experiments; settings as key=value")],
    rounds: Annotated[int, typer.Option(help="rounds; the two sides take turns", min=1)] = 9,
    steps: Annotated[int, typer.Option(help="steps per round", min=1)] = 10,
    against: Annotated[
        str, typer.Option(help="bare, anchor, diffusers, muon, ddpm, solver: see above; all: every one")
    ] = "bare",
    out: Annotated[Path | None, typer.Option(help="folder for speed.json and speed.txt; default: none")] = None,
    trust: Trust = False,
) -> None:
    """Time a training step against a bare PyTorch loop.

    `--against anchor` takes the same experiment without auxiliary modalities, `diffusers` the loop of diffusers'
    unconditional example, `muon` Muon against the bare loop with AdamW, `ddpm` denoising-diffusion-pytorch at equal
    FLOPs. `solver` times a sampling step against the bare solver of diffusers. The table says which bars are reached.
    """
    from mmdiff.config import load_config

    files, overrides = files_and_overrides("CONFIG", configs)
    read_only(trust)
    loaded = tuple(load_config(Path(file), list(overrides)) for file in files)
    from mmdiff.benchmarks.speed import Request, run

    echo(run(Request(loaded, rounds, steps, against, trust, out)))


@benchmark.command()
def reconstruction(
    runs: Annotated[
        list[str],
        typer.Argument(help="run folders, or YAML files, which are trained first; settings as key=value"),
    ],
    data: Annotated[str | None, typer.Option(help="another data.source")] = None,
    patterns: Annotated[str, typer.Option(help="hole patterns: squares,box,half,checkerboard,free-form")] = "squares",
    ratios: Annotated[str, typer.Option(help="shares of hidden pixels: 0.1,0.25,0.5,0.75")] = "0.5",
    images: Annotated[int, typer.Option(help="held-out images", min=2)] = 64,
    seeds: Annotated[int, typer.Option(help="sampling seeds", min=1)] = 1,
    steps: Annotated[str, typer.Option(help="solver steps of draws; several numbers give several rows")] = "20",
    guidance: Annotated[str, typer.Option(help="classifier-free guidance of draws: 1,1.5")] = "1",
    methods: Annotated[
        str | None,
        typer.Option(help="only these methods: concatenation,head,repaint …; default: all that the runs can do"),
    ] = None,
    repaint: Annotated[
        list[str] | None,
        typer.Option(
            help="jump_length,jump_n_sample,steps of RePaint: 5,3,20 (default) is 50 evaluations, 10,6,50 is 250, the "
            "published 10,10,250 is 2410. Repeat the option for several"
        ),
    ] = None,
    sdedit: Annotated[str, typer.Option(help="evaluations of SDEdit")] = "50",
    sweep: Annotated[
        str, typer.Option(help="factors of a YAML file's learning rate; a short run tries each")
    ] = "1,2,4",
    reference: Annotated[
        str | None, typer.Option(help="the row to compare all others with, by its name in the table")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of runs and results; the same command continues there")] = Path(
        "runs/reconstruction"
    ),
    trust: Trust = False,
) -> None:
    """Fill holes of held-out images by every method.

    The methods are all that the runs can do, and baselines without a model. The table has LPIPS, PSNR and SSIM with
    intervals, paired differences, time and network evaluations.
    """
    names, overrides = files_and_overrides("RUN", runs)
    jumps = tuple(integers("--repaint", text) for text in repaint or ["5,3,20"])
    for jump in jumps:
        if len(jump) != 3 or min(jump) < 1:
            raise InputError("--repaint", jump, "write jump_length,jump_n_sample,steps, each >= 1: 10,10,250")
    rows = integers("--steps", steps), numbers("--guidance", guidance), jumps, integers("--sdedit", sdedit)
    factors, shares = numbers("--sweep", sweep), numbers("--ratios", ratios)
    from mmdiff.benchmarks.reconstruction.methods import Options
    from mmdiff.benchmarks.reconstruction.run import Request, run

    request = Request(
        names,
        (*overrides, *([f"data.source={data}"] if data else ())),
        tuple(patterns.split(",")),
        shares,
        images,
        seeds,
        tuple(methods.split(",")) if methods else None,
        Options(*rows),
        factors,
        reference,
        out,
        trust,
    )
    echo(run(request))


@benchmark.command()
def gpu(
    out: Annotated[Path, typer.Option(help="folder of results; it must not hold some already")] = Path("runs/gpu"),
    budget: Annotated[float, typer.Option(help="minutes in all; parts for which none are left are told")] = 9.0,
    toy: Annotated[bool, typer.Option(help="a toy size, on a CPU too: does everything run?")] = False,
) -> None:
    """Measure training and sampling on one accelerator, without a network.

    Images per second, share of the measured matrix peak and memory of every backbone and precision, compiled or not;
    losses of bf16 against fp32; whether the host waits for the accelerator; latency of sampling; a real training; a
    killed run that goes on. Results are written as they come.
    """
    from mmdiff.benchmarks.gpu.run import Request, run

    echo(run(Request(out, budget, toy), lambda text: typer.echo(text, err=True)))


@benchmark.command("fusion-speed")
def fusion_speed(
    sets: Annotated[int, typer.Option(help="image sets in the batch", min=1)] = 64,
    largest: Annotated[int, typer.Option(help="members of the largest set; sizes run from 1 to it", min=1)] = 20,
    dim: Annotated[int, typer.Option(help="features of a member", min=1)] = 512,
    rounds: Annotated[int, typer.Option(help="rounds; the table has medians", min=1)] = 20,
    threads: Annotated[int, typer.Option(help="CPU threads", min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Time the fusions of image sets against a loop over sets."""
    from mmdiff.benchmarks.fusion.speed import compare_fusions

    echo(compare_fusions(sets, largest, dim, rounds, threads, device))


@benchmark.command()
def fusion(
    experiments: Annotated[list[str], typer.Argument(help="YAML files of experiments/fusion; settings as key=value")],
    out: Annotated[Path, typer.Option(help="results; the same command continues there")] = Path("runs/fusion"),
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's", min=1)] = None,
    device: Annotated[str, typer.Option(help="cpu; cuda for learner: vlm")] = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="read settings and photos, say what would be compared, write nothing")
    ] = False,
    trust: Trust = False,
) -> None:
    """Answer questions about image sets by every fusion.

    Beside the fusions stand one large image of all members, single images, votes, and an oracle that drops the
    distractors. The table has accuracy, precision and recall against the number of members and the share of
    distractors, and gains paired by seed. `distractors=foreign` (random, coherent, none) chooses what does not belong.
    """
    files, overrides = files_and_overrides("EXPERIMENT", experiments)
    read_only(trust)
    from mmdiff.benchmarks.fusion.run import Request, run

    for text in run(Request(files, overrides, out, threads, trust, dry_run, device)):
        echo(text)


@benchmark.command()
def coherence(
    config: ConfigPath,
    overrides: Overrides = None,
    sides: Annotated[
        str | None, typer.Option(help="mmdiff,MMVAE+,CMVAE,MVTCAE,MoPoE,JMVAE; default: all that are installed")
    ] = None,
    missing: Annotated[str, typer.Option(help="shares of training rows without an image")] = "0,0.2,0.5",
    seconds: Annotated[float, typer.Option(help="CPU time of a training")] = 120.0,
    seeds: Annotated[int, typer.Option(help="training seeds", min=1)] = 3,
    learning_rates: Annotated[
        str, typer.Option(help="factors of each side's learning rate; of several, short runs choose: 0.5,1,2")
    ] = "1",
    rows: Annotated[int, typer.Option(help="held-out rows, and joint samples", min=4)] = 256,
    label: Annotated[str, typer.Option(help="column of the classes that the judges read")] = "label",
    out: Annotated[Path, typer.Option(help="results; the same command continues there")] = Path("runs/coherence"),
    trust: Trust = False,
) -> None:
    """Do images that are generated together show the same thing?

    Several images of one class per row; each given subset predicts the others, and a classifier per modality judges.
    Beside mmdiff stand multimodal VAEs (`pip install 'mmdiff[peers]'`), trained on the same rows for the same CPU
    time. The table has joint and conditional coherence, label accuracy and Fréchet distances by missing rate.
    """
    read_only(trust)
    from mmdiff.benchmarks.coherence.run import Request, run

    request = Request(
        config,
        tuple(overrides or ()),
        tuple(sides.split(",")) if sides else None,
        numbers("--missing", missing),
        seconds,
        seeds,
        numbers("--learning-rates", learning_rates),
        rows,
        label,
        out,
        trust,
    )
    for line in run(request):
        echo(line)


@benchmark.command()
def backbones(
    rounds: Annotated[int, typer.Option(help="rounds; the table has medians", min=1)] = 9,
    batch: Annotated[int, typer.Option(help="images", min=1)] = 4,
    side: Annotated[int, typer.Option(help="height and width of the latents", min=4)] = 32,
    patch: Annotated[int, typer.Option(help="height and width of a patch", min=1)] = 2,
    width: Annotated[int, typer.Option(help="channels of a token", min=8)] = 384,
    depth: Annotated[int, typer.Option(help="blocks, against diffusers", min=1)] = 4,
    heads: Annotated[int, typer.Option(help="heads of the attention", min=1)] = 6,
    deep: Annotated[int, typer.Option(help="blocks, for checkpointing and dropped tokens", min=3)] = 12,
    threads: Annotated[int, typer.Option(help="CPU threads", min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file")] = None,
) -> None:
    """Time the transformer against that of diffusers.

    Further rows: bfloat16, activation checkpointing and its memory, tokens dropped in the middle.
    """
    from mmdiff.benchmarks.backbones import Request, run

    sizes = {"side": side, "patch": patch, "width": width, "depth": depth, "heads": heads, "deep": deep}
    echo(run(Request(rounds, batch, **sizes, threads=threads, device=device, out=out)))


@benchmark.command()
def variants(
    config: ConfigPath,
    overrides: Overrides = None,
    variant: Annotated[
        list[str] | None, typer.Option(help='"NAME key=value …", once per variant: "swiglu backbone.mlp=swiglu"')
    ] = None,
    seeds: Annotated[int, typer.Option(help="training seeds", min=1)] = 3,
    seconds: Annotated[float, typer.Option(help="CPU time of a training; 0: train.steps", min=0)] = 0.0,
    rows: Annotated[int, typer.Option(help="held-out rows, and samples", min=4)] = 256,
    bins: Annotated[int, typer.Option(help="parts of the time axis", min=1)] = 5,
    out: Annotated[Path, typer.Option(help="folder of results; the same command continues there")] = Path(
        "runs/variants"
    ),
    trust: Trust = False,
) -> None:
    """Train variants of an experiment at the same budget, over several seeds.

    The table has the held-out loss by time with nothing given, and the Fréchet distance of joint samples.
    """
    read_only(trust)
    from mmdiff.benchmarks.variants import Request, run

    echo(
        run(
            Request(
                config, tuple(overrides or ()), tuple(variant or ("as-it-is",)), seeds, seconds, rows, bins, out, trust
            )
        )
    )
