"""`mmdiff benchmark reconstruction`: runs are trained or opened, every method fills the same holes, all is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmdiff.benchmarks.reconstruction import report
from mmdiff.benchmarks.reconstruction.benchmark import Benchmark
from mmdiff.benchmarks.reconstruction.methods import DEFAULTS, Options, Trained
from mmdiff.benchmarks.reconstruction.sweep import swept
from mmdiff.benchmarks.tables import leave
from mmdiff.config import Config, load_config
from mmdiff.errors import InputError
from mmdiff.grids import table
from mmdiff.runs import load
from mmdiff.trust import refuse_custom, stay_offline


@dataclass(frozen=True)
class Request:
    """What a benchmark asks for.

    Attributes:
        sources: run folders and YAML files of experiments, in the order of the rows.
        experiments: {YAML file: its config}; they are trained first.
        overrides: "key=value", of all.
        out: folder of trained runs, finished parts and results.
        patterns, ratios: of the holes.
        images, seeds: how many.
        methods: names, or None: all that the runs can do.
        options: rows of the methods.
        factors: of an experiment's learning rate, tried by short runs.
        reference: label of the row that all others are compared with.
        trust: import custom modalities and contact the hub for runs that are not one's own.
    """

    sources: Sequence[str]
    experiments: Mapping[str, Config]
    overrides: Sequence[str] = ()
    out: Path = Path("runs/reconstruction")
    patterns: Sequence[str] = ("squares",)
    ratios: Sequence[float] = (0.5,)
    images: int = 64
    seeds: int = 1
    methods: Sequence[str] | None = None
    options: Options = DEFAULTS
    factors: Sequence[float] = (1.0, 2.0, 4.0)
    reference: str | None = None
    trust: bool = False


def run(request: Request) -> str:
    """The table, and the names of the files that were written.

    Raises:
        InputError: a source holds no run, or its data or methods do not fit the others.
    """
    own = request.experiments
    if not own and not request.trust:
        stay_offline()
    folders = [swept(own[s], request.factors, request.out) if s in own else Path(s) for s in request.sources]
    if len(own) < len(request.sources) and not request.trust:
        stay_offline()  # one's own experiments are trained; what stands beside them may be a stranger's
    trained = [
        _opened(folder, request.overrides, request.trust or source in own)
        for source, folder in zip(request.sources, folders, strict=True)
    ]
    hub = request.trust or bool(own)  # all have the data of one's own experiment
    benchmark = Benchmark(
        trained,
        request.out,
        request.patterns,
        request.ratios,
        request.images,
        request.seeds,
        request.methods,
        request.options,
        hub,
    )
    results = benchmark.results()
    tree = report.tree(benchmark, results, request.reference)
    columns = report.pictures(benchmark, results)
    files = leave(request.out / "reconstruction", tree, report.text(tree), table(columns).save)
    return f"{report.text(tree, each_pattern=False)}\n{files}"


def _opened(folder: Path, overrides: Sequence[str], trust: bool) -> Trained:
    pipeline = load(folder, trust=trust)
    pipeline.set_progress_bar_config(disable=True)
    if not (folder / "config.yaml").is_file():
        raise InputError("RUN", str(folder), "is no run folder: it has no config.yaml")
    config = load_config(folder / "config.yaml", list(overrides))
    if not trust:
        refuse_custom(config.model_dump()["modalities"])
    return Trained(folder.name, config, pipeline, folder)
