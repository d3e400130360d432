"""What is compared, and what is refused before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmdiff.benchmarks.coherence.ours import train_ours
from mmdiff.benchmarks.coherence.peers import PEERS, installed, train_peer
from mmdiff.benchmarks.coherence.sides import Side
from mmdiff.config import Config
from mmdiff.errors import InputError

OURS = "mmdiff"
SIDES: dict[str, Side] = {OURS: train_ours, **{name: partial(train_peer, name) for name in PEERS}}
#: Settings of a training that the other sides do not have.
_UNREAD = ("data.augment", "data.buckets", "data.streaming", "train.initialize_from", "train.lora", "train.resume")


@dataclass(frozen=True)
class Request:
    """What is compared.

    Attributes:
        experiment: a YAML file whose modalities are all images.
        overrides: settings as key=value.
        sides: keys of `SIDES`; None: all that are installed.
        missing: shares of training rows from which an image is hidden, each image but the anchor for itself.
        seconds: CPU time of each training.
        seeds: of training, 0 … seeds − 1.
        learning_rates: factors of each side's own learning rate; with several, a short run of each chooses.
        rows: held-out rows that are given, and joint samples.
        label: column of the classes.
        out: folder of parts and results.
        trust: whether the experiment may name code and contact the hub.
    """

    experiment: Path
    overrides: tuple[str, ...] = ()
    sides: tuple[str, ...] | None = None
    missing: tuple[float, ...] = (0.0, 0.2, 0.5)
    seconds: float = 120.0
    seeds: int = 3
    learning_rates: tuple[float, ...] = (1.0,)
    rows: int = 256
    label: str = "label"
    out: Path = Path("runs/coherence")
    trust: bool = False


def chosen_sides(request: Request) -> tuple[str, ...]:
    """What is compared.

    Raises:
        InputError: a name is unknown, or its package is not installed.
    """
    if request.sides is None:
        return tuple(SIDES) if installed() else (OURS,)
    for side in request.sides:
        if side not in SIDES:
            raise InputError("--sides", side, f"is unknown; choose of {', '.join(SIDES)}")
        if request.sides.count(side) > 1:
            raise InputError("--sides", side, "is named twice")
        if side in PEERS and not installed():
            raise InputError("--sides", side, "needs multivae: pip install 'mmdiff[peers]'")
    return request.sides


def check_numbers(request: Request) -> None:
    """Refuse numbers out of range.

    Raises:
        InputError: naming the option.
    """
    for share in request.missing:
        if not 0 <= share < 1 or request.missing.count(share) > 1:
            raise InputError("--missing", share, "write different shares, 0 <= share < 1: 0,0.2,0.5")
    for factor in request.learning_rates:
        if not 0 < factor <= 1000 or request.learning_rates.count(factor) > 1:
            raise InputError("--learning-rates", factor, "write different factors, 0 < factor <= 1000: 0.5,1,2")
    if not 0 < request.seconds <= 1e7:
        raise InputError("--seconds", request.seconds, "needs CPU seconds, 0 < seconds <= 1e7")


def check_experiment(config: Config) -> None:
    """Refuse an experiment that has other things than images.

    Raises:
        InputError: naming the key.
    """
    for name, entry in config.modalities.items():
        if entry.kind != "image":
            raise InputError(f"modalities.{name}.kind", entry.kind, "only images are compared; leave it out")
    if len(config.modalities) < 2:
        raise InputError("modalities", list(config.modalities), "needs two images at least")
    if config.data.missing:
        raise InputError("data.missing", config.data.missing, "is what --missing sets; leave it out")
    for key in _UNREAD:
        section, _, name = key.partition(".")
        own = getattr(config, section)
        if (value := getattr(own, name)) != type(own).model_fields[name].default:
            raise InputError(key, value, "is not read here; leave it out")
