"""The model: saved and loaded alike, independent of dict order, and strict about its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import LAYERS, random_model
from refusals import refused
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.model import MTDiffusionModel, MTDiffusionModelOutput

MODALITIES: dict[str, dict[str, Any]] = {
    "image": {"kind": "image", "channels": 1, "size": 8},
    "label": {"kind": "label", "num_classes": 3},
    "colour": {"kind": "label", "num_classes": 2},
}
BACKBONE = {"kind": "unet", **LAYERS}
VALUES = {
    "image": torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8),
    "label": torch.tensor([2, 0]),
    "colour": torch.tensor([1, 0]),
}
EVERYWHERE, NOWHERE = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)


def build(modalities: dict[str, dict[str, Any]] = MODALITIES, anchor: str = "image", seed: int = 0) -> MTDiffusionModel:
    return random_model(modalities, seed, anchor=anchor)


@torch.no_grad()
def run(model: MTDiffusionModel) -> MTDiffusionModelOutput:
    sample = torch.linspace(-2, 2, 2 * 64).reshape(2, 1, 8, 8)
    observed = {"image": EVERYWHERE, "colour": EVERYWHERE}
    observation = model.observation(VALUES, {"label": EVERYWHERE}, observed, like=sample)
    return model(sample, torch.tensor([3, 11]), observation)


def assert_same(one: MTDiffusionModel, other: MTDiffusionModel) -> None:
    ours, theirs = run(one), run(other)
    assert torch.equal(ours.prediction, theirs.prediction)
    assert ours.params.keys() == theirs.params.keys()
    assert all(torch.equal(ours.params[name], theirs.params[name]) for name in ours.params)
    encodings = other.encode(VALUES)
    assert all(torch.equal(encoding, encodings[name]) for name, encoding in one.encode(VALUES).items())


def test_output_has_a_head_for_every_auxiliary_modality() -> None:
    output = run(build())
    assert output.prediction.shape == (2, 1, 8, 8)
    assert {name: params.shape for name, params in output.params.items()} == {"colour": (2, 2), "label": (2, 3)}


def test_saved_and_loaded_it_computes_the_same(tmp_path: Path) -> None:
    for settings in [{}, {"low_cpu_mem_usage": False}]:
        model = build()
        model.save_pretrained(tmp_path)
        loaded = MTDiffusionModel.from_pretrained(tmp_path, **settings)
        assert isinstance(loaded, MTDiffusionModel)
        assert_same(model, loaded)
        assert loaded.config.anchor == "image"


def test_the_folder_holds_only_safetensors_and_json(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_from_config_rebuilds_the_architecture() -> None:
    model = build()
    rebuilt = MTDiffusionModel.from_config(model.config).eval()
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert_same(model, rebuilt)


def test_the_order_of_the_dict_does_not_matter() -> None:
    """Saved configs come back with sorted keys; even the initial weights are the same."""
    reverse = dict(reversed(MODALITIES.items()))
    assert list(reverse) != list(MODALITIES)
    assert build().names == build(reverse).names == ("colour", "image", "label")
    assert_same(build(), build(reverse))


def test_the_caller_may_reuse_its_config() -> None:
    modalities = {name: dict(entry) for name, entry in MODALITIES.items()}
    build(modalities)
    assert modalities == MODALITIES


def test_observation_shows_what_is_observed_and_where() -> None:
    model, like = build(), torch.zeros(2, 1, 8, 8)
    first = torch.tensor([True, False])
    observation = model.observation(VALUES, {"colour": EVERYWHERE}, {"label": first, "image": ~first}, like)
    # flags (aggregated, observed) of colour, image, label
    assert observation.flags.tolist() == [[1, 0, 0, 0, 0, 1], [1, 0, 0, 1, 0, 0]]
    colour, image, label = observation.channels.split(1, dim=1)
    assert not colour.any()
    assert torch.equal(image, VALUES["image"] * (~first)[:, None, None, None])
    assert torch.equal(label[0], model.encode({"label": VALUES["label"]})["label"][0])
    assert not label[1].any()


def test_a_context_is_seen_where_its_modality_is_observed_and_nowhere_else() -> None:
    modalities = MODALITIES | {"label": {**MODALITIES["label"], "observe_as": "context"}}
    model, sample = build(modalities), torch.zeros(2, 1, 8, 8)
    half = torch.tensor([True, False])
    flags = model.observation(VALUES, {}, {"label": half}, like=sample).flags
    assert flags.shape == (2, 2 * 3 + 3)  # two states each, and three classes
    assert flags[1].eq(0).all()
    assert flags[0].tolist() == pytest.approx([0, 0, 0, 0, 0, 1, 0, 0, 3**0.5])  # colour, image, label and its class
    assert model.observation(VALUES, {"label": half}, {}, like=sample).flags[0].sum() == 1  # aggregated is not observed


def test_observation_of_nothing_needs_no_values() -> None:
    model, like = build(), torch.zeros(2, 1, 8, 8)
    for observed in ({}, {"label": NOWHERE}):
        observation = model.observation({} if not observed else VALUES, {}, observed, like)
        assert not observation.channels.any()
        assert not observation.flags.any()


def test_observation_follows_the_dtype_of_the_sample() -> None:
    for dtype in [torch.float64, torch.bfloat16]:
        observation = build().observation(VALUES, {}, {"image": EVERYWHERE}, torch.zeros(2, 1, 8, 8, dtype=dtype))
        assert observation.channels.dtype == observation.flags.dtype == dtype


def test_names_that_a_module_cannot_hold_are_refused() -> None:
    for name in ["type", "to", "a.b", "a b", "", "3d", "forward", "training"]:
        with refused("modalities"):
            build({**MODALITIES, name: MODALITIES["label"]})


IMPOSSIBLE = [
    (MODALITIES, "picture", "anchor", "picture"),
    (MODALITIES, "label", "anchor", "label"),
    ({**MODALITIES, "label": {"kind": "lable"}}, "image", "modalities.label.kind", "lable"),
    ({**MODALITIES, "label": {}}, "image", "modalities.label.kind", None),
]


def test_impossible_configs_are_refused() -> None:
    for modalities, anchor, key, value in IMPOSSIBLE:
        with refused(key, value):
            build(modalities, anchor)


NO_CONFIG = [None, 3, "x", [], {}, {1: 2}, {"image": 3}]


WRONG = [
    ("modality_config", NO_CONFIG[:4]),
    ("backbone_config", NO_CONFIG[:4]),
    ("anchor", [None, 3, ["image"], {}]),
    ("observable", [3, "image", {}, [1], ["picture"]]),
    ("config", NO_CONFIG),
]


def test_arguments_of_another_type_are_refused_by_name() -> None:
    for key, values in WRONG:
        for value in values:
            with pytest.raises(InputError) as refusal:
                if key == "config":
                    MTDiffusionModel.from_config(value)
                else:
                    MTDiffusionModel(**{**build().config, key: value})
            assert refusal.value.key.startswith(key), value


def test_an_argument_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    for load in (MTDiffusionModel.from_pretrained, MTDiffusionModel.from_config):
        with refused("anchr", "image"):
            load(tmp_path if load == MTDiffusionModel.from_pretrained else model.config, anchr="image")


def test_an_unknown_backbone_is_refused() -> None:
    with refused("backbone.kind", "resnet"):
        MTDiffusionModel(modality_config=MODALITIES, backbone_config={"kind": "resnet"})


def test_a_second_image_is_an_auxiliary_with_a_head() -> None:
    model = build({"image": MODALITIES["image"], "depth": {**MODALITIES["image"], "scale": 2.0}})
    observation = model.observation({}, {}, {}, like=torch.zeros(2, 1, 8, 8))
    params: Tensor = model(torch.zeros(2, 1, 8, 8), torch.zeros(2), observation).params["depth"]
    assert params.shape == (2, 2, 8, 8)  # mean and log σ
    assert model.modalities["image"].head is None
