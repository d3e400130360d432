"""`mmdiff benchmark reconstruction`: trains experiments, fills holes by every method, writes the results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmdiff.benchmarks.cache import write_results
from mmdiff.benchmarks.reconstruction import report
from mmdiff.benchmarks.reconstruction.benchmark import Benchmark
from mmdiff.benchmarks.reconstruction.methods import DEFAULTS, Options
from mmdiff.benchmarks.reconstruction.sweep import swept
from mmdiff.benchmarks.reconstruction.trained import Trained
from mmdiff.config import load_config
from mmdiff.errors import InputError
from mmdiff.grids import table as picture
from mmdiff.runs import load
from mmdiff.trust import refuse_custom, stay_offline


@dataclass(frozen=True)
class Request:
    """What is compared.

    Attributes:
        runs: run folders, and YAML files of experiments, which are one's own and are trained first.
        overrides: settings as key=value, of all of them.
        patterns, ratios: of the holes.
        images: how many held-out images.
        seeds: how many, of what is drawn.
        methods: names of `METHODS`, or None: all that the runs can do.
        options: the methods' rows.
        factors: of a YAML file's learning rate, see `swept`.
        reference: the row that all others are compared with, see `report.tree`.
        out: folder of runs, parts and results.
        trust: whether run folders may name code and contact the hub.
    """

    runs: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ("squares",)
    ratios: tuple[float, ...] = (0.5,)
    images: int = 64
    seeds: int = 1
    methods: tuple[str, ...] | None = None
    options: Options = DEFAULTS
    factors: tuple[float, ...] = (1.0,)
    reference: str | None = None
    out: Path = Path("runs/reconstruction")
    trust: bool = False


def run(request: Request) -> str:
    """The table, and the files that were written.

    Raises:
        InputError: a run, a name or a setting does not fit.
    """
    trained = _trained(request)
    benchmark = Benchmark(
        trained,
        request.out,
        request.patterns,
        request.ratios,
        request.images,
        request.seeds,
        request.methods,
        request.options,
        hub=request.trust or any(map(_is_experiment, request.runs)),  # all have the data of one's own experiment
    )
    results = benchmark.results()
    tree = report.tree(benchmark, results, request.reference)
    files = write_results(
        request.out,
        "reconstruction",
        tree,
        report.text(tree),
        lambda path: picture(report.pictures(benchmark, results)).save(path),
    )
    return "\n".join([report.text(tree, each_pattern=False), *(f"wrote {path}" for path in files.values())])


def _is_experiment(text: str) -> bool:
    return text.endswith((".yaml", ".yml"))


def _trained(request: Request) -> list[Trained]:
    """The runs in their order. A run folder may be a stranger's: from its first file on nobody is contacted."""
    experiments = {text: load_config(text, list(request.overrides)) for text in request.runs if _is_experiment(text)}
    strangers = len(experiments) < len(request.runs) and not request.trust
    if strangers and not experiments:
        stay_offline()
    folders = {text: swept(config, request.factors, request.out) for text, config in experiments.items()}
    if strangers:
        stay_offline()
    return [
        _opened(folders.get(text, Path(text)), request.overrides, request.trust or text in folders)
        for text in request.runs
    ]


def _opened(folder: Path, overrides: tuple[str, ...], trust: bool) -> Trained:
    pipeline = load(folder, trust=trust)
    pipeline.set_progress_bar_config(disable=True)
    if not (folder / "config.yaml").is_file():
        raise InputError("RUN", str(folder), "is no run folder: it has no config.yaml")
    config = load_config(folder / "config.yaml", list(overrides))
    if not trust:
        refuse_custom(config.model_dump()["modalities"])
    return Trained(folder.name, config, pipeline, folder)
