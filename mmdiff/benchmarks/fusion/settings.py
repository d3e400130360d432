"""Settings of `mmdiff benchmark fusion`: one YAML file is one experiment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from mmdiff.benchmarks.fusion.entries import ASKED, ENTRIES
from mmdiff.config import parse_arguments, read_plain
from mmdiff.config.base import FolderName
from mmdiff.errors import InputError

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
COLUMN = re.compile(r"\{([^{}]+)\}")  # in a question
DistractorKind = Literal["source", "none", "random", "foreign", "coherent"]


def _chosen(entries: list[str]) -> list[str]:
    """In the table's order."""
    known = (*ASKED, *ENTRIES)
    if unknown := [entry for entry in entries if entry not in known]:
        raise ValueError(f"{unknown[0]!r} is unknown; choose of {'; '.join(known)}")
    return [entry for entry in known if entry in entries]


def _rising(shares: list[float]) -> list[float]:
    if shares[0] > shares[1]:
        raise ValueError("needs the least share first")
    return shares


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class SetData(_Strict):
    """Rows with a column of lists of photos."""

    source: str  # "shapes" with image sets, "image_sets", "abo", … see `mmdiff.data`
    # of the source; a source that makes image sets has their law here, another one has the photos of each row
    options: dict[str, Any] = {}
    split: str = "train"
    validation_split: str = "validation"
    photos: str = "photos"
    distractors: str = "distractors"  # lists of bool
    objects: str = "objects"  # lists of what each photo shows
    front: str = "image"  # one more photo of each, in no set, by which it is found (learner: retrieval)
    size: Count = 24  # side of a photo in pixels


class Task(_Strict):
    """What is asked about a set, and how answers are compared."""

    columns: Annotated[list[str], Field(min_length=1)]  # their texts are the answer
    # to a language model, and to a fusion that takes a query; {column} stands for what the row has there
    question: str = "what is it ?"
    kind: Literal["label", "attributes", "caption"] = "label"  # see `mmdiff.benchmarks.fusion.scores`

    @property
    def asks(self) -> tuple[str, ...]:
        """The columns in the question."""
        return tuple(COLUMN.findall(self.question))


class Test(_Strict):
    """The held-out image_sets."""

    rows: Count = 500
    views: Annotated[list[Count], Field(min_length=1)] = [1, 2, 4, 6]
    distractors: Annotated[list[Share], Field(min_length=1)] = [0.0, 0.25, 0.5]


class Distractors(_Strict):
    """Which photos do not belong, see `mmdiff.benchmarks.fusion.distractors`.

    source: the law of the source; none; random: pixels in random order; foreign: each shows another object; coherent:
    all show one other object.
    """

    train: DistractorKind = "source"
    test: DistractorKind = "source"
    # of training sets, drawn uniformly
    share: Annotated[list[Share], Field(min_length=2, max_length=2), AfterValidator(_rising)] = [0.0, 0.5]

    @model_validator(mode="before")
    @classmethod
    def _of_both(cls, kind: Any) -> Any:
        return {"train": kind, "test": kind} if isinstance(kind, str) else kind


class Schedule(_Strict):
    """Of AdamW with one cycle of the learning rate."""

    steps: Annotated[int, Field(ge=0)]
    batch_size: Count = 64
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3


class Small(_Strict):
    """A model of `mmdiff.vlm.small`."""

    kind: str = "llava"
    patch: Count = 8
    width: Count = 64
    layers: Count = 2
    heads: Count = 4
    queries: Count = 4


class Settings(_Strict):
    """One experiment of `mmdiff benchmark fusion`."""

    name: FolderName
    # encoder → fusion → linear layer; the same, but the nearest front view answers; or a vision-language model
    learner: Literal["classifier", "retrieval", "vlm"] = "classifier"
    seeds: Count = 5
    data: SetData
    distractors: Distractors = Distractors()
    # what is compared; null: all that the learner has
    entries: Annotated[list[str], Field(min_length=1), AfterValidator(_chosen)] | None = None
    tasks: Annotated[dict[str, Task], Field(min_length=1)]
    test: Test = Test()
    hidden: Count = 64  # width of the attentions' layer
    pretraining: Schedule  # on single photos, without distractors; 0 steps for a published model
    training: Schedule  # on image sets
    encoder: dict[str, Any] = {"kind": "convolutions"}  # of the classifier, see `mmdiff.modalities.encoders`
    # on image sets: the fusion; the classifier's head, too; or all, of a language model as well
    learns: Literal["fusion", "head", "all"] = "fusion"
    told: bool = False  # whether the classifier's head, then one of two layers, knows the question
    small: Small = Small()  # the vision-language model
    model: str | None = None  # another one by hub name or folder
    new_tokens: Count = 12  # of an answer


def load_settings(path: str | Path, overrides: list[str] | None = None) -> Settings:
    """Read a YAML file with `key=value` overrides.

    Raises:
        InputError: one line with the key, the value and the remedy.
    """
    return parse_settings(read_plain("EXPERIMENT", path, overrides))


def parse_settings(tree: Any) -> Settings:
    """Check a plain tree.

    Raises:
        InputError: for what is unknown, missing or of another type.
    """
    if not isinstance(tree, dict):
        raise InputError("EXPERIMENT", tree, "must be a mapping of keys")
    arguments = {name: (field.annotation, field) for name, field in Settings.model_fields.items()}
    settings = Settings(**parse_arguments("fusion", arguments, tree))
    if settings.learner != "vlm" and len(settings.tasks) > 1:
        raise InputError("fusion.tasks", list(settings.tasks), "a classifier has one task; learner: vlm has several")
    if settings.learner == "vlm" and settings.learns == "head":
        raise InputError("fusion.learns", "head", "is of a classifier; choose fusion or all")
    if settings.learner != "classifier" and settings.told:
        raise InputError("fusion.told", True, "is of a classifier; leave it out")
    asked = len(settings.tasks) > 1 or any(task.asks for task in settings.tasks.values())
    needing = [entry for entry in settings.entries or [] if entry in ASKED] + ["told"] * settings.told
    if needing and not asked:
        remedy = "needs questions that differ: put a column in braces into a task's question"
        raise InputError("fusion", needing[0], remedy)
    return settings
