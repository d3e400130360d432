"""Bad values made from the schema itself: every one is refused in one line, in time, or is no nonsense."""

from __future__ import annotations

import copy
import inspect
import math
import time
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from mmdiff.backbones import UNet
from mmdiff.build import build_stand_in
from mmdiff.config import Config, ModalityConfig, parse_config
from mmdiff.errors import InputError
from mmdiff.modalities import MODALITIES
from mmdiff.pipeline import MTDiffusionPipeline

Tree = dict[str, Any]
SECONDS = 5.0
SETTINGS: Tree = {  # of each kind, complete
    "image": {"channels": 1, "size": 16},
    "label": {"num_classes": 10},
    "mask": {"num_classes": 4, "size": 16},
    "masked_image": {"channels": 1, "size": 16},
    "dense": {"channels": 1, "size": 16},
    "embedding": {"dim": 5},
    "image_set": {"channels": 1, "size": 16, "max_images": 2},
    "vector": {"dim": 3},
}
NEVER = [math.nan, math.inf, {"a": {"b": []}}]  # of no key
WRONG = {  # by the type that a key declares
    int: ["a", "", -1, -(10**12), 1.5, True, 10**30, [1], None],
    float: ["a", "", -1.0, 1e30, True, [1.0], None],
    bool: ["a", 7, -1, 1.5, [True], None],
    str: [3, True, 1.5, ["a"], None],
}


def kinds(annotation: Any) -> set[Any]:
    """The plain types in an annotation; None for an optional one."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kinds(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*(kinds(one) for one in arguments))
    if origin is typing.Literal:
        return {"choice"}
    return {type(None) if annotation in (None, type(None)) else origin or annotation}


def bad_values(annotation: Any) -> Iterator[Any]:
    """Values that a key of this type must not silently take, whatever it means."""
    found = kinds(annotation)
    plain = [kind for kind in found if kind in WRONG]
    if "choice" in found:
        yield from ("nonsense", "", 3.5, ["a"])
    for value in NEVER if not plain or found & {int, float, bool, str, "choice"} else []:
        if not (isinstance(value, dict) and found & {dict, Any}):
            yield value
    if len(plain) == 1:
        yield from (
            v for v in WRONG[plain[0]] if not (v is None and type(None) in found) and type(v) not in found - {plain[0]}
        )
    if found & {tuple, list, dict} and not plain:
        yield from ("a", 7)


def fields(model: type[BaseModel], *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, annotation) of every key of the config."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        section = next((k for k in kinds(kind) if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if kind == dict[str, ModalityConfig]:
            yield from fields(ModalityConfig, *path, name, "label")
        elif section:
            yield from fields(section, *path, name)
        else:
            yield (*path, name), kind


def changed(tree: Tree, path: tuple[str, ...], value: Any) -> Tree:
    """The tree with one other value."""
    found = copy.deepcopy(tree)
    section = found
    for name in path[:-1]:
        section = section.setdefault(name, {})
    section[path[-1]] = value
    return found


def outcome(call: Callable[[], object]) -> str:
    """ "refused", "taken", or what else came out; too slow is a fault, too."""
    started = time.perf_counter()
    try:
        call()
        said = "taken"
    except InputError as error:
        said = "refused" if "\n" not in str(error) and len(str(error)) < 2000 else f"no line: {error}"
    except Exception as error:
        said = f"traceback: {type(error).__name__}: {str(error)[:150]}"
    spent = time.perf_counter() - started
    return said if spent < SECONDS else f"slow: {spent:.1f} s"


def faults(cases: Iterator[tuple[str, Any, Callable[[], object]]], least: int) -> list[str]:
    """What was not refused of cases (key, value, call), of which there are at least so many."""
    said = [(key, value, outcome(call)) for key, value, call in cases]
    assert len(said) >= least
    return [f"{key} = {value!r:.60}: {what}" for key, value, what in said if what != "refused"]


@pytest.fixture
def known(tiny: Tree) -> Tree:
    """The tiny tree that needs no data."""
    for name, entry in tiny["modalities"].items():
        entry |= SETTINGS[name]
    return tiny


def test_every_key_of_the_schema(known: Tree) -> None:
    def cases() -> Iterator[tuple[str, Any, Callable[[], object]]]:
        for path, annotation in fields(Config):
            for value in bad_values(annotation):
                if str(path[-1]) in ("options",) or (value == "" and kinds(annotation) == {str}):
                    continue
                if path == ("train", "mixed_precision") and value is False:
                    continue
                if path[:2] == ("data", "augment") and value == 7:  # one number for a range
                    continue
                yield ".".join(path), value, lambda p=path, v=value: parse_config(changed(known, p, v))
            yield ".".join(path), "unknown", lambda p=path: parse_config(changed(known, (*p[:-1], p[-1] + "x"), 1))

    open_sections = ("modalities.label", "backbone", "scheduler")
    found = faults(cases(), 300)
    assert [f for f in found if not (f.startswith(open_sections) and "'unknown'" in f)] == []


def arguments(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls.__init__)
    skipped = {"self", "shape", "head", "space", "observation_channels", "flag_widths", "return"}
    return {n: hints[n] for n in inspect.signature(cls.__init__).parameters if n not in skipped and n in hints}


@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_every_setting_of_a_modality(known: Tree, kind: str) -> None:
    name = "image" if kind == "image" else "x"

    def cases() -> Iterator[tuple[str, Any, Callable[[], object]]]:
        tree = changed(known, ("modalities", name), {"kind": kind, **SETTINGS[kind]})
        for key, annotation in arguments(MODALITIES[kind]).items():
            signed = key in ("mean", "log_norm_mean", "ignore", "unknown")
            for value in bad_values(annotation):
                if signed and isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
                    continue
                changed_ = changed(tree, ("modalities", name, key), value)
                yield key, value, lambda t=changed_: build_stand_in(parse_config(t))
        yield "unknown", 1, lambda: build_stand_in(parse_config(changed(tree, ("modalities", name, "nonsense"), 1)))

    assert faults(cases(), 5) == []


def test_every_setting_of_a_backbone(known: Tree) -> None:
    special = {
        "block_out_channels": [[], [0, 16], [-8, 16], [6, 16], ["a"], [8.5, 16], [8] * 9, [10**9, 10**9]],
        "attention": [[True], [1, 2, 3], [[]]],
        "attention_head_dim": [0, 3],
        "norm_num_groups": [0, 3],
        "patch_size": [0, 3, 32],
        "dropout": [1.0, 2.0],
        "pooled_grid": [-1],
        "context_grid": [-1, 3],
        "layers_per_block": [0],
        "time_scale_shift": ["", "nonsense"],
    }

    def cases() -> Iterator[tuple[str, Any, Callable[[], object]]]:
        for key, annotation in arguments(UNet).items():
            for value in [*bad_values(annotation), *special.get(key, [])]:
                changed_ = changed(known, ("backbone", key), value)
                yield key, value, lambda t=changed_: build_stand_in(parse_config(t))

    assert faults(cases(), 60) == []


def test_what_only_the_parts_know(known: Tree) -> None:
    """Values that the schema takes, and that make no sense where they are used."""
    bad: dict[str, list[Any]] = {
        "modalities.label.num_classes": [-3, 0, 1, 10**12],
        "modalities.label.table_size": [0, -1, 3, 17],
        "modalities.label.names": [["a"], "ab", [1, 2]],
        "modalities.label.observe_as": ["", "nothing"],
        "modalities.label.kind": ["", "labels", "os:system", "nowhere.at:All", ":", "a:b:c"],
        "modalities.label.weight.schedule": ["", "nonsense"],
        "modalities.image.size": [0, -1, "a", [16], [16, 0], [16, 16, 16], 10**9, 17, []],
        "modalities.image.channels": [0, 2, 4, -1, "RGB"],
        "modalities.image.space": ["", "pixels", "latent"],
        "modalities.image.background": [-1, 256, "white", [1, 2], [0, 0, 300]],
        "backbone.kind": ["", "vnet"],
        "scheduler.kind": ["", "ddim"],
        "scheduler.solver": ["", "Euler", "os.system"],
        "scheduler.solver_config": [{"nonsense": 1}, {"solver_order": 9}, {"algorithm_type": "x"}, {"solver_type": 3}],
        "scheduler.beta_schedule": ["", "nonsense"],
        "scheduler.beta_start": [-0.1, 1.5, "a", math.nan],
        "scheduler.beta_end": [-0.1, 1.5, "a", math.inf],
        "scheduler.trained_betas": [[0.1], "a", [2.0] * 50, [-0.1] * 50],
        "scheduler.prediction_type": ["", "x"],
        "scheduler.timestep_spacing": ["", "x"],
        "data.masking": [{"x": {}}, {"label": {"pattern": "nonsense"}}, {"label": {"ratio": [0.9, 0.1]}}],
        "data.missing": [{"x": 0.1}, {"label": 1.5}],
        "data.embeddings": [{"x": {}}],
        "data.columns": [{"x": "y"}],
        "evaluate.masking": [{"a": {"pattern": "nonsense"}}, {"a": {"ratio": [0.9, 0.1]}}, {"a": {"ratio": 2}}],
        "anchor": ["", "x", "label"],
        "name": ["", "a/b", "..", "."],
    }

    def cases() -> Iterator[tuple[str, Any, Callable[[], object]]]:
        for key, values in bad.items():
            for value in values:
                tree = changed(known, tuple(key.split(".")), value)
                yield key, value, lambda t=tree: build_stand_in(parse_config(t))

    assert faults(cases(), 80) == []


def test_every_argument_of_the_pipeline(all_kinds: Path) -> None:
    pipeline = MTDiffusionPipeline.from_pretrained(all_kinds)
    pipeline.set_progress_bar_config(disable=True)
    bad: dict[str, list[Any]] = {
        "batch_size": [0, -1, 1.5, "a", True, 10**30, math.nan, [1]],
        "num_inference_steps": [-1, 21, 1.5, "a", True, 10**30, math.nan, [1], None],
        "guidance_scale": [-1.0, math.nan, math.inf, "a", {"x": 2.0}, {"label": math.nan}, [1], True],
        "head_guidance_scale": [-1.0, math.nan, math.inf, "a", {"x": 2.0}, [1]],
        "conditioning": ["", "x", ["x"], {"x": "concatenation"}, 3],
        "resampling": [(0, 1), (1, 0), (1,), "a", 3, (1.5, 2), (math.nan, 1)],
        "read_timesteps": [[-1], [20], [1.5], ["a"], "a", []],
        "aggregate": ["x", ["x"], 3, ["image"]],
        "feedback": ["", "x", 3, "mode"],
        "generator": ["a", 3, [3], [torch.Generator(), torch.Generator()]],
        "output_type": ["", "np", 3, None],
        "max_batch_size": [0, -1, 1.5, "a"],
        "observed": [
            3,
            {"x": 1},
            {"label": 3},
            {"label": -1},
            {"label": math.nan},
            {"label": "x"},
            {"label": []},
            {"label": None},
            {"image": "x.png"},
            {"image": torch.full((1, 3, 8, 8), 2.0)},
            {"image": torch.full((1, 3, 8, 8), math.nan)},
            {"image": torch.zeros(1, 1, 8, 8)},
            {"embedding": [math.inf] * 5},
            {"embedding": [0.0, 1.0]},
            {"depth": torch.full((1, 1, 8, 8), math.inf)},
            {"label": [0, 1], "mask": torch.zeros(3, 8, 8, dtype=torch.int64)},
        ],
    }

    def cases() -> Iterator[tuple[str, Any, Callable[[], object]]]:
        for key, values in bad.items():
            for value in values:
                yield key, value, lambda k=key, v=value: pipeline(**{"num_inference_steps": 1, k: v})

    assert faults(cases(), 80) == []


SAMPLE = ("num", "steps", "guidance", "conditioning", "aggregate", "solver", "feedback", "batch-size", "dtype", "seed")


def test_every_option_of_the_command_line(cli: Callable[..., Any], finished_run: Path, tmp_path: Path) -> None:
    calls = [
        ("sample", finished_run, "--observe", "label=3", f"--{name}", value)
        for name in SAMPLE
        for value in ("", "x", "-1", "nan", "1e30")
    ]
    calls += [("sample", finished_run, "--observe", v) for v in ("", "=", "x=1", "label=", "label=77", "image=no.png")]
    calls += [("sample", finished_run, "--out", tmp_path), ("sample", finished_run, "--nonsense"), ("sample",), ("x",)]
    calls += [("evaluate", finished_run, f"--{n}", "x") for n in ("steps", "solver", "feedback", "conditioning")]
    calls += [("evaluate", finished_run, o) for o in ("x", "x=1", "evaluate.seeds=[]", "evaluate.num_samples=1")]
    calls += [(c, p) for c in ("sample", "evaluate", "train", "show") for p in ("nowhere", tmp_path, "/dev/null")]
    found = []
    for call in calls:
        started = time.perf_counter()
        answer = cli(
            *(call if call[:1] != ("sample",) or "--out" in call else (*call, "--out", tmp_path / f"{len(found)}.png"))
        )
        spent = time.perf_counter() - started
        if answer.code == 0 or answer.err.count("mmdiff: ") != 1 or "Traceback" in answer.err or spent > SECONDS:
            found.append((call, answer.code, answer.err[-200:], round(spent, 1)))
    assert len(calls) >= 70 and found == []
