"""`mmdiff sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdiff.cli.options import RunPath, Trust, echo, read_only

if TYPE_CHECKING:
    from mmdiff.config import SampleConfig


def sample(
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
        typer.Option(
            help="how observed values steer: concatenation, aggregation, head-guidance, replacement, or several"
        ),
    ] = None,
    aggregate: Annotated[str | None, typer.Option(help="what enters z_t: all, none, or names with commas")] = None,
    solver: Annotated[str | None, typer.Option(help="another solver than the run's")] = None,
    feedback: Annotated[str | None, typer.Option(help="unknown modalities: draw, mean or mode")] = None,
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
    read_only(trust)
    own = _sample_config(run)
    from mmdiff import runs

    pipeline = runs.load(run, solver, trust)
    runs.prepare(pipeline, dtype, compiled)
    settings = {
        "num_inference_steps": steps or own.steps,
        "feedback": own.feedback if feedback is None else feedback,
        "max_batch_size": batch_size or own.batch_size,
    }
    if conditioning is not None:
        settings["conditioning"] = conditioning.split(",")
    if aggregate is not None:
        settings["aggregate"] = {"all": True, "none": False}.get(aggregate, aggregate.split(","))
    scales = own.scales if guidance is None else guidance
    for line in runs.sample(pipeline, observe or [], num, seed, out, save_each, scales, settings):
        echo(line)


def _sample_config(run: Path) -> SampleConfig:
    """The run's own `sample` settings; a bare pipeline folder has none."""
    from mmdiff.config import SampleConfig, load_config

    return load_config(run / "config.yaml").sample if (run / "config.yaml").is_file() else SampleConfig()
