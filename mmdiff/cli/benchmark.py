"""`mmdiff benchmark …`: its commands. Heavy imports wait until one runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmdiff.cli.options import ConfigPath, Overrides, Trust, echo, integers, numbers, read_only
from mmdiff.errors import InputError
from mmdiff.trust import refuse_custom, stay_offline

benchmark = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Compare methods on the same data.")


@benchmark.command()
def speed(
    config: ConfigPath,
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(help="rounds; the two sides take turns", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="steps per round", min=1)] = 10,
    against: Annotated[str, typer.Option(help="bare, anchor or solver: see above")] = "bare",
    trust: Trust = False,
) -> None:
    """Time a training step against a bare PyTorch loop.

    `--against anchor` takes the same experiment without auxiliary modalities. `--against solver` times a sampling step
    against the bare solver of diffusers.
    """
    from mmdiff.config import load_config

    read_only(trust)
    loaded = load_config(config, overrides)
    if not trust:
        refuse_custom(loaded.model_dump()["modalities"])
    from mmdiff.benchmarks.speed import compare

    echo(compare(loaded, rounds, steps, against, hub=trust))


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
    from mmdiff.config import load_config

    given = [text for text in runs if "=" not in text or Path(text).exists()]
    overrides = [text for text in runs if text not in given] + ([f"data.source={data}"] if data else [])
    if not given:
        raise InputError("RUN", None, "name a run folder or an experiment's YAML file")
    experiments = {text: load_config(text, overrides) for text in given if text.endswith((".yaml", ".yml"))}
    jumps = [integers("--repaint", text) for text in repaint or ["5,3,20"]]
    for jump in jumps:
        if len(jump) != 3 or min(jump) < 1:
            raise InputError("--repaint", jump, "write jump_length,jump_n_sample,steps, each >= 1: 10,10,250")
    if not experiments and not trust:
        stay_offline()
    factors, shares = numbers("--sweep", sweep), numbers("--ratios", ratios)
    counts, scales, evaluations = (
        integers("--steps", steps),
        numbers("--guidance", guidance),
        integers("--sdedit", sdedit),
    )
    from mmdiff.benchmarks.reconstruction import report as standings
    from mmdiff.benchmarks.reconstruction.methods import Options, Trained
    from mmdiff.benchmarks.reconstruction.run import Benchmark
    from mmdiff.benchmarks.reconstruction.sweep import swept
    from mmdiff.evaluation.report import make_room
    from mmdiff.grids import table as picture
    from mmdiff.runs import load

    folders = [swept(experiments[text], factors, out) if text in experiments else Path(text) for text in given]
    if len(experiments) < len(given) and not trust:
        stay_offline()  # one's own experiments are trained; what stands beside them may be a stranger's
    trained = []
    for text, folder in zip(given, folders):
        trusted = trust or text in experiments
        pipeline = load(folder, trust=trusted)
        pipeline.set_progress_bar_config(disable=True)
        if not (folder / "config.yaml").is_file():
            raise InputError("RUN", str(folder), "is no run folder: it has no config.yaml")
        own = load_config(folder / "config.yaml", overrides)
        if not trusted:
            refuse_custom(own.model_dump()["modalities"])
        trained.append(Trained(folder.name, own, pipeline, folder))
    options = Options(counts, scales, tuple(jumps), evaluations)
    chosen = methods.split(",") if methods else None
    hub = trust or bool(experiments)  # all have the data of one's own experiment
    scene = Benchmark(trained, out, patterns.split(","), shares, images, seeds, chosen, options, hub)
    results = scene.results()
    found = standings.tree(scene, results, reference)
    table, columns = standings.text(found), standings.pictures(scene, results)
    files = [out / f"reconstruction{suffix}" for suffix in (".json", ".txt", ".png")]
    for file in files:
        make_room(file)
    files[0].write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    files[1].write_text(table + "\n")
    picture(columns).save(files[2])
    echo(standings.text(found, each_pattern=False) + "\n" + "\n".join(f"wrote {file}" for file in files))


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
    trust: Trust = False,
) -> None:
    """Answer questions about image sets by every fusion.

    Beside the four fusions stand one large image of all members, and single images. The table has accuracy, precision
    and recall against the number of members and the share of distractors.
    """
    from mmdiff.benchmarks.fusion.settings import load_settings

    given = [text for text in experiments if "=" not in text or Path(text).exists()]
    overrides = [text for text in experiments if text not in given]
    if not given:
        raise InputError("EXPERIMENT", None, "name an experiment's YAML file")
    read_only(trust)
    settings = [load_settings(text, overrides) for text in given]
    names = [one.name for one in settings]
    for name in names:
        if names.count(name) > 1:
            raise InputError("EXPERIMENT", name, "is the name of two experiments")
    import torch

    from mmdiff.benchmarks.fusion import run as fusion_accuracy
    from mmdiff.data.sources import refuse_hub
    from mmdiff.evaluation.report import make_room
    from mmdiff.plots import accuracy_by_photos

    for one in settings if not trust else ():
        refuse_custom(one.encoder, "fusion.encoder")
        refuse_hub("fusion.data", one.data.source, one.data.options)
    if threads is not None:
        torch.set_num_threads(threads)
    for one in settings:
        found = fusion_accuracy.tree(one, fusion_accuracy.results(one, out))
        files = [out / f"{one.name}{suffix}" for suffix in (".json", ".txt", ".png")]
        for file in files:
            make_room(file)
        files[0].write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        files[1].write_text(fusion_accuracy.text(found) + "\n")
        accuracy_by_photos(found["rows"], files[2])
        echo(fusion_accuracy.text(found) + "\n" + "\n".join(f"wrote {file}" for file in files))
