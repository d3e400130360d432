"""`mmdiff check-modality`."""

from __future__ import annotations

from typing import Annotated

import typer

from mmdiff.cli.options import echo, integers


def check_modality(
    kind: Annotated[str, typer.Argument(help="a class of yours by import path, my_depth:Depth, or a kind")],
    settings: Annotated[list[str] | None, typer.Argument(help="its settings as key=value: size=32")] = None,
    space: Annotated[str, typer.Option(help="shape of the noisy anchor: channels,height,width")] = "3,16,16",
) -> None:
    """Check a modality of your own against the contract.

    Says in words what fails. The exit code is 1 if something does.
    """
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
