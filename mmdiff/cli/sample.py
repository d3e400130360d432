"""`mmdiff sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdiff.cli.options import RunPath, Trust, echo, read_only

if TYPE_CHECKING:
    from mmdiff.config import SampleConfig


Observe = Annotated[
    list[str] | None,
    typer.Option(
        help="a condition, modality=value: label=3, label=cat, caption='a red ring', image=photo.png, mask=ids.png, "
        "embedding=vec.npy, "
        "masked_image=photo.png@mask.png (white is known, black is the hole) or one image that is transparent in "
        "the hole. Repeat the option for several conditions. Images of another size are cropped and resized"
    ),
]
Order = Annotated[
    str | None,
    typer.Option(
        help="of diffused modalities: anchor_first, together, or phases: image,mask+depth; default: the run's"
    ),
]
Read = Annotated[
    str | None, typer.Option(help="from the image: mode, draw, or denoise where diffused; default: the run's")
]
ReadSteps = Annotated[int | None, typer.Option(help="steps of a denoised read; default: the run's", min=1)]


def sample(
    run: RunPath,
    observe: Observe = None,
    num: Annotated[int, typer.Option(help="number of samples", min=1)] = 64,
    steps: Annotated[int | None, typer.Option(help="solver steps; default: the run's sample.steps", min=1)] = None,
    guidance: Annotated[
        str | None, typer.Option(help="classifier-free guidance: 2, or label=2,embedding=1.5; default: the run's")
    ] = None,
    conditioning: Annotated[
        str | None,
        typer.Option(
            help="how conditions steer: concatenation, aggregation, head-guidance, replacement; several with commas"
        ),
    ] = None,
    aggregate: Annotated[
        str | None, typer.Option(help="modalities to aggregate: all, none, or names with commas")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="another solver: DDIMScheduler")] = None,
    lora: Annotated[Path | None, typer.Option(help="an adapter for the run's network: adapter/ of a run")] = None,
    feedback: Annotated[str | None, typer.Option(help="of unknown aggregated modalities: draw, mean or mode")] = None,
    order: Order = None,
    read: Read = None,
    read_steps: ReadSteps = None,
    batch_size: Annotated[
        int | None, typer.Option(help="samples per batch; default: the run's sample.batch_size", min=1)
    ] = None,
    height: Annotated[int | None, typer.Option(help="of images, in pixels; default: as trained", min=1)] = None,
    width: Annotated[int | None, typer.Option(help="the same", min=1)] = None,
    dtype: Annotated[str, typer.Option(help="precision of the networks: fp32 or bf16")] = "fp32",
    compiled: Annotated[bool, typer.Option("--compile", help="compile the backbone by torch.compile first")] = False,
    seed: Annotated[int, typer.Option(help="sample k depends on the seed and on k alone", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="the grid, a new PNG")] = Path("grid.png"),
    save_each: Annotated[
        Path | None, typer.Option(help="a new folder for one file per modality and sample, as --observe reads")
    ] = None,
    trust: Trust = False,
) -> None:
    """Draw samples from a run, and write a grid of them."""
    read_only(trust)
    own = _sample_config(run)
    from mmdiff import runs

    pipeline = runs.load(run, solver, trust, lora)
    runs.prepare(pipeline, dtype, compiled)
    settings = {
        "num_inference_steps": steps or own.steps,
        "feedback": own.feedback if feedback is None else feedback,
        "order": own.order if order is None else _order(order),
        "read": own.read if read is None else read,
        "read_steps": own.read_steps if read_steps is None else read_steps,
        "max_batch_size": batch_size or own.batch_size,
        "height": height,
        "width": width,
    }
    if conditioning is not None:
        settings["conditioning"] = conditioning.split(",")
    if aggregate is not None:
        settings["aggregate"] = {"all": True, "none": False}.get(aggregate, aggregate.split(","))
    scales = own.scales if guidance is None else guidance
    echo("\n".join(runs.sample(pipeline, observe or [], num, seed, out, save_each, scales, settings)))


def _order(text: str) -> str | list[list[str]]:
    """ "image,mask+depth" -> [[image], [mask, depth]]; one word stays."""
    return [phase.split("+") for phase in text.split(",")] if set(text) & set(",+") else text


def _sample_config(run: Path) -> SampleConfig:
    """The run's own `sample` settings; a bare pipeline folder has none."""
    from mmdiff.config import SampleConfig, load_config

    return load_config(run / "config.yaml").sample if (run / "config.yaml").is_file() else SampleConfig()
