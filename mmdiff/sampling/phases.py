"""In which phases the anchor and the diffused modalities are denoised, and how the rest is read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mmdiff.errors import InputError
from mmdiff.model import MTDiffusionModel
from mmdiff.values import names, whole

ANCHOR_FIRST, TOGETHER = ORDERS = ("anchor_first", "together")
MODE, DRAW, DENOISE = READS = ("mode", "draw", "denoise")
Order = str | Iterable[str | Iterable[str]]


@dataclass(frozen=True)
class Phases:
    """What is denoised together, phase after phase.

    Attributes:
        names: of the anchor and of diffused modalities, which share their noise level within a phase.
        read: how unobserved modalities are read from the anchor, one of `READS`. "denoise": diffused ones keep what
            their phase gave, others are read by their mode.
        read_steps: solver steps of a phase without the anchor.
    """

    names: tuple[frozenset[str], ...]
    read: str
    read_steps: int


def phases_of(
    model: MTDiffusionModel,
    observed: Collection[str],
    steps: int,
    total: int,
    order: Order | None = None,
    read: str | None = None,
    read_steps: int | None = None,
    by_levels: bool = False,
) -> Phases:
    """The checked phases of a call.

    Args:
        model: the networks.
        observed: names of the observed modalities.
        steps: of the solver; 0: the anchor is not denoised.
        total: T, the largest number of steps.
        order, read, read_steps: as of the pipeline.
        by_levels: whether the heads read the anchor at noise levels that the call names.

    Raises:
        InputError: naming the argument.
    """
    _check_used(model, {"order": order, "read_steps": read_steps, "read": DENOISE if read == DENOISE else None})
    if read_steps is not None and whole("read_steps", read_steps, 1) > total:
        raise InputError("read_steps", read_steps, f"needs 1 … num_train_timesteps = {total}")
    read_steps = steps if read_steps is None else read_steps
    open_ = frozenset(model.gains) - set(observed)
    anchor = frozenset({model.anchor} - set(observed))
    able = bool(open_) and read_steps > 0 and not by_levels and not (anchor and steps == 0)
    read = _read(read, able, bool(open_))
    phases = _in_order(order, anchor, open_)
    if anchor and steps == 0:
        phases = []
    elif read != DENOISE:  # nothing after the anchor, or without it, would be kept
        last = next((k + 1 for k, phase in enumerate(phases) if phase & anchor), 0)
        phases = phases[:last]
    return Phases(tuple(phases), read, read_steps)


def _check_used(model: MTDiffusionModel, arguments: Mapping[str, Any]) -> None:
    for key, value in arguments.items():
        if value is not None and not model.gains:
            raise InputError(key, value, "is for diffused modalities, of which this model has none; leave it out")


def _read(read: str | None, able: bool, needed: bool) -> str:
    if read is None:
        return DENOISE if able else MODE
    if not isinstance(read, str) or read not in READS:
        raise InputError("read", read, f"choose one of {', '.join(READS)}")
    if read == DENOISE and needed and not able:
        remedy = "needs steps, and no read_timesteps: set read_steps, or num_inference_steps where the anchor is drawn"
        raise InputError("read", read, remedy)
    return MODE if read == DENOISE and not able else read


def _in_order(order: Order | None, anchor: frozenset[str], open_: frozenset[str]) -> list[frozenset[str]]:
    """Phases of all that is denoised.

    Raises:
        InputError: for an unknown order, and for a list that does not name each once.
    """
    if order is None or order == ANCHOR_FIRST:
        return [phase for phase in (anchor, open_) if phase]
    if order == TOGETHER:
        return [anchor | open_] if anchor | open_ else []
    if isinstance(order, str) or not isinstance(order, Iterable):
        raise InputError("order", order, f"choose {' or '.join(ORDERS)}, or a list of phases: [image, [mask, depth]]")
    phases = [names("order", phase) for phase in order]
    said = sorted(name for phase in phases for name in phase)
    if said != sorted(anchor | open_) or not all(phases):
        wanted = ", ".join(sorted(anchor | open_)) or "nothing"
        raise InputError("order", [sorted(phase) for phase in phases], f"needs each of these once: {wanted}")
    return [frozenset(phase) for phase in phases]
