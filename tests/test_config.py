"""A config is read back as it was written, and every mistake is one line with the dotted key and the value."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel
from refusals import refused

from mmdiff.config import Config, ModalityConfig, first_difference, load_config, parse_config, save_config
from mmdiff.errors import InputError

Tree = dict[str, Any]
Configure = Callable[..., Config]


def leaves(model: type[BaseModel], *path: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, annotation) of every key of the config."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, UnionType):  # an optional section is a section
            kind = next((one for one in get_args(kind) if isinstance(one, type) and issubclass(one, BaseModel)), kind)
        if kind == dict[str, ModalityConfig]:
            yield from leaves(ModalityConfig, *path, name, "label")
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, *path, name)
        else:
            yield ".".join((*path, name)), kind


LEAVES = dict(leaves(Config))


def changed(tree: Tree, key: str, value: Any) -> Tree:
    config = OmegaConf.create(tree)
    OmegaConf.update(config, key, value, merge=False, force_add=True)
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return plain


def test_writing_and_reading_gives_the_same_config(tiny: Tree, tmp_path: Path) -> None:
    tiny["train"] |= {"learning_rate": 1e-5, "betas": [0.5, 1e-9], "resume": "auto", "weight_decay": 0}
    tiny["modalities"]["label"] |= {"num_classes": 10, "weight": {"schedule": "none"}, "states": {"observed": 0.25}}
    tiny["scheduler"] |= {"solver": "DDIMScheduler", "solver_config": {"eta": 1.0}, "trained_betas": [1e-7, 0.5]}
    tiny["data"] |= {"columns": {"label": "yes"}, "holdout": 7}
    config = parse_config(tiny)
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert again.modalities["label"].settings() == {"num_classes": 10}
    assert first_difference(again, config, ignore=set()) is None


def test_a_wrong_type_is_refused_by_name(tiny: Tree) -> None:
    for key in sorted(LEAVES):
        kind = LEAVES[key]
        is_dict = get_origin(kind) is dict or "dict[" in str(kind)
        wrong: Any = "nonsense" if is_dict else {"nonsense": 1}
        with refused(key, wrong):
            parse_config(changed(tiny, key, wrong))


OUT_OF_RANGE = {
    "train.steps": 0,
    "train.batch_size": -1,
    "train.learning_rate": 0.0,
    "train.ema_decay": 1.0,
    "train.mixed_precision": "fp8",
    "data.holdout": 1,
    "states.observed": 1.5,
    "states.distribution": "heads and tails",
    "modalities.label.weight.schedule": "linear",
    "modalities.label.weight.scale": -0.5,
    "modalities.label.states.aggregated": 2,
    "scheduler.num_train_timesteps": 1,
    "evaluate.num_samples": 1,
    "track": "mlflow",
    "name": "a/b",
    "anchor": "picture",
}


def test_a_value_out_of_range_is_refused_by_name(tiny: Tree) -> None:
    for key in OUT_OF_RANGE:
        value = OUT_OF_RANGE[key]
        with refused(key, value):
            parse_config(changed(tiny, key, value))


def test_l1_has_one_weighting(tiny: Tree) -> None:
    both = changed(changed(tiny, "loss.min_snr_gamma", 5.0), "loss.uncertainty", True)
    with refused("loss.uncertainty", True, "min_snr_gamma"):
        parse_config(both)


def test_a_truth_value_is_no_number(tiny: Tree) -> None:
    for key in ["train.steps", "train.seed", "evaluate.num_samples"]:
        with refused(key, True):
            parse_config(changed(tiny, key, True))


BAD_OVERRIDES = [
    ("train.step=5", "train.step", 5, "steps?"),
    ("trian={}", "trian", {}, "train?"),
    ("modalities.label.weight.scael=1", "modalities.label.weight.scael", 1, "scale?"),
    ("modalities.label.states.agregated=1", "modalities.label.states.agregated", 1, "aggregated?"),
    ("zzz=1", "zzz", 1, "anchor, "),
    ("train.steps=many", "train.steps", "many"),
    ("train=5", "train", 5),
    ("train.steps", "override", "train.steps"),
    ("anchor=foo", "anchor", "foo", "image, label"),
    ("data.columns.depth=z", "data.columns.depth", "z"),
]


def test_a_bad_override_is_one_line(configure: Configure) -> None:
    for override, key, value, *facts in BAD_OVERRIDES:
        with refused(key, value, *facts):
            configure(override)


def test_an_override_that_is_no_yaml_is_named(configure: Configure) -> None:
    with refused("override", "train.steps=[1"):
        configure("train.steps=[1")


def test_overrides_win_over_the_file_and_later_ones_over_earlier(configure: Configure) -> None:
    config = configure("train.steps=7", "train.steps=8", "data.columns.label=digit", "modalities.label.num_classes=3")
    assert config.train.steps == 8
    assert config.column("label") == "digit" and config.column("image") == "image"
    assert config.modalities["label"].settings() == {"num_classes": 3}
    assert config.train.batch_size == 12  # untouched


def test_every_choice_can_be_written_as_documented(configure: Configure) -> None:
    """Plain YAML reads a bare `no` as false."""
    for key in ["train.mixed_precision", "train.lr_scheduler_type"]:
        section, name = key.split(".") if "." in key else ("", key)
        for choice in LEAVES[key].__args__:
            config: Any = configure(f"{key}={choice}")
            assert getattr(getattr(config, section) if section else config, name) == choice


def test_a_missing_key_is_named(tiny: Tree) -> None:
    for key in ["name", "data", "data.source", "modalities", "modalities.label.kind"]:
        *path, last = key.split(".")
        tree = copy.deepcopy(tiny)
        section = tree
        for part in path:
            section = section[part]
        del section[last]
        with refused(key, None):
            parse_config(tree)


def test_garbage_is_one_line(tmp_path: Path) -> None:
    for text in ["a: [1", "a: b: c", "- a\n- b", "5", "\x00", "", "train: ${nothing}\nname: x"]:
        path = tmp_path / "garbage.yaml"
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            load_config(path)
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere.yaml")
    with refused("config", path):
        load_config(path)


def test_the_first_difference_is_found_and_what_may_change_is_ignored(configure: Configure) -> None:
    one, other = configure(), configure("train.steps=7", "train.log_every=4", "modalities.label.num_classes=3")
    assert first_difference(one, other, ignore=set()) == ("modalities.label.num_classes", None, 3)
    ignore = {"modalities", "train.log_every"}
    assert first_difference(one, other, ignore) == ("train.steps", 6, 7)
    assert first_difference(one, other, ignore | {"train.steps"}) is None


def test_a_config_knows_its_folder_and_its_auxiliary_modalities(configure: Configure) -> None:
    least = {"name": "x", "data": {"source": "digits"}, "modalities": {"image": {"kind": "image"}}}
    assert parse_config(least).folder() == Path("runs/x")
    assert configure("output=there").folder() == Path("there")
    assert configure().auxiliary() == ["label"]
    assert configure("anchor=label").auxiliary() == ["image"]
