"""Fine-tuning takes what means the same in another model: classes by name, inputs by modality, schedules."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import LAYERS, alive
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdiff.config import Config
from mmdiff.errors import InputError
from mmdiff.model import MTDiffusionModel, MTDiffusionModelOutput
from mmdiff.objective import MTObjective
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.schedulers import MTDiffusionScheduler
from mmdiff.states import StateProbabilities
from mmdiff.training import train
from mmdiff.training.initialize import initialize

Kinds = dict[str, dict[str, Any]]
IMAGE = {"kind": "image", "channels": 1, "size": 8}
MASK = {"kind": "mask", "num_classes": 3, "size": 8, "pattern_size": 2}


def label(names: str | None, **settings: Any) -> dict[str, Any]:
    named = {"num_classes": len(names), "names": list(names)} if names else {}
    return {"kind": "label", **named, **settings}


def objective(kinds: Kinds, seed: int, uncertainty: bool = False, **backbone: Any) -> MTObjective:
    """With random weights, also where a fresh network has zeros."""
    torch.manual_seed(seed)
    model = MTDiffusionModel({"image": IMAGE, **kinds}, {"kind": "unet", **LAYERS, **backbone})
    learned = {name: {"schedule": "learned"} for name in kinds if model.modalities[name].aggregable}
    scheduler = MTDiffusionScheduler(num_train_timesteps=20, weights=learned)
    probabilities = {name: StateProbabilities(0.5, 0.5) for name in model.names}
    weights = dict.fromkeys(model.generated, 1.0)
    return alive(MTObjective(model, scheduler, probabilities, weights, uncertainty=uncertainty))


def moved(folder: Path, before: Kinds, now: Kinds, **backbone: Any) -> tuple[MTObjective, MTObjective, dict[str, Any]]:
    """(the source, the new model with its weights, what `origin.json` keeps)."""
    source, new = objective(before, 1, **backbone), objective(now, 2, **backbone)
    MTDiffusionPipeline(model=source.model, scheduler=source.scheduler).save_pretrained(folder)
    return source, new, initialize(new, str(folder), print)


def predicted(objective: MTObjective, **observed: Tensor) -> MTDiffusionModelOutput:
    """In float64, with these values observed, on the same noise."""
    model, generator = copy.deepcopy(objective.model).double(), torch.Generator().manual_seed(3)
    z_t = torch.randn(4, *model.space, generator=generator, dtype=torch.float64)
    here = torch.ones(4, dtype=torch.bool)
    with torch.no_grad():
        seen = model.observation(observed, {}, dict.fromkeys(observed, here), like=z_t)
        return model(z_t, torch.tensor([0, 5, 10, 19]), seen)


BACKBONES = [
    {},
    {"patch_size": 2, "input_skip": True},
    {"patch_size": 2, "context_grid": 2, "pooled_grid": 2},
]


@pytest.mark.parametrize("backbone", BACKBONES, ids=["plain", "patches", "grids"])
@pytest.mark.parametrize("observe_as", ["channels", "context"])
def test_a_grown_model_computes_what_the_old_one_did(observe_as: str, backbone: dict, tmp_path: Path) -> None:
    before = {"label": label("abc", observe_as=observe_as)}
    now = {"label": label("dcab", observe_as=observe_as), "area": MASK, "numbers": {"kind": "vector", "dim": 2}}
    source, new, origin = moved(tmp_path / "source", before, now, **backbone)
    for observed, renamed in (({}, {}), ({"label": torch.tensor([0, 1, 2, 0])}, {"label": torch.tensor([2, 3, 1, 2])})):
        one, other = predicted(source, **observed), predicted(new, **renamed)
        torch.testing.assert_close(other.prediction, one.prediction, rtol=0, atol=1e-6)
        torch.testing.assert_close(other.pooled, one.pooled, rtol=0, atol=1e-6)
        torch.testing.assert_close(other.params["label"][:, [2, 3, 1]], one.params["label"], rtol=0, atol=1e-6)
    classes = torch.tensor([0, 1, 2])
    old_label, new_label = source.model.modalities["label"], new.model.modalities["label"]
    assert torch.equal(new_label.encode(torch.tensor([2, 3, 1])), old_label.encode(classes))
    assert origin["partly"]["modalities.label.table"] == "rows: 3 taken, 1 new" and not origin["left"]
    assert {"modalities.area.palette", "modalities.numbers.map", "schedule_shapes.area"} <= set(origin["new"])
    assert len(origin["taken"]) + len(origin["partly"]) + len(origin["new"]) == len(new.state_dict())


def test_new_inputs_start_without_effect_and_learn(tmp_path: Path) -> None:
    source, new, _ = moved(tmp_path / "source", {"label": label("abc")}, {"label": label("abc"), "area": MASK})
    areas = new.model.modalities["area"].examples(4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(predicted(new, area=areas).prediction, predicted(source).prediction, rtol=0, atol=1e-6)
    model, here = new.model, torch.ones(4, dtype=torch.bool)
    z_t = torch.randn(4, *model.space)
    seen = model.observation({"area": areas}, {}, {"area": here}, like=z_t)
    model(z_t, torch.tensor([0, 5, 10, 19]), seen).prediction.square().sum().backward()
    assert model.backbone.unet.conv_in.weight.grad[:, 1:4].flatten(2).any(dim=2).all()  # image, area's three, …


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("told", ["names", "values", "colors", "ids"])
def test_rows_of_masks_follow_their_classes(told: str, size: int, tmp_path: Path) -> None:
    lists = {
        "names": (list("abc"), list("cdab")),
        "values": ([0, 7, 9], [9, 1, 0, 7]),
        "colors": ([[0, 0, 0], [0, 0, 7], [9, 0, 0]], [[9, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 7]]),
        "ids": (None, None),
    }
    settings = [{"num_classes": count, "size": size} for count in (3, 4)]
    for one, entries in zip(settings, lists[told], strict=True):
        one |= {} if entries is None else {told: entries}
    before, now = ({"area": {**MASK, **one}} for one in settings)
    source, new, origin = moved(tmp_path / "source", before, now, patch_size=2)
    places = torch.tensor([0, 1, 2] if told == "ids" else [2, 3, 0])
    values = torch.randint(3, (4, size, size), generator=torch.Generator().manual_seed(4))
    for observed, renamed in (({}, {}), ({"area": values}, {"area": places[values]})):
        one, other = predicted(source, **observed), predicted(new, **renamed)
        torch.testing.assert_close(other.prediction, one.prediction, rtol=0, atol=1e-6)
        torch.testing.assert_close(other.params["area"][:, places], one.params["area"], rtol=0, atol=1e-6)
    old, grown = source.model.modalities["area"], new.model.modalities["area"]
    torch.testing.assert_close(grown.encode(places[values]), old.encode(values), rtol=0, atol=1e-6)
    assert "modalities.area.head.conv.bias" in origin["partly"]


def test_what_is_gone_is_left_out(tmp_path: Path) -> None:
    before = {"label": label("abc"), "area": MASK, "numbers": {"kind": "vector", "dim": 2}}
    source, new, origin = moved(tmp_path / "source", before, {"label": label("ca")})
    torch.testing.assert_close(predicted(new).prediction, predicted(source).prediction, rtol=0, atol=1e-6)
    assert origin["partly"]["modalities.label.table"] == "rows: 2 taken, 1 left out" and not origin["new"]
    assert "modalities.area.palette" in origin["left"] and "schedule_shapes.numbers" in origin["left"]


BEFORE, IDS = label("abc"), {"kind": "label", "num_classes": 3}


@pytest.mark.parametrize(
    ("before", "now", "places"),
    [
        (IDS, BEFORE, [0, 1, 2]),  # names on one side only: by id
        (BEFORE, {**IDS, "ids": [2, 0, 5]}, [1, None, 0]),
        ({**IDS, "ids": [4, 7, 9]}, {**IDS, "ids": [9, 4, 3]}, [1, None, 0]),
        (BEFORE, label("xyz"), None),
        (BEFORE, {**label("abc"), "table_size": 2}, None),
        (BEFORE, {"kind": "vector", "dim": 3}, None),
    ],
)
def test_rows_of_labels_follow_their_classes(before: dict, now: dict, places: list | None, tmp_path: Path) -> None:
    source, new, origin = moved(tmp_path / "source", {"label": before}, {"label": now})
    if places is None:
        assert not any(n in ("modalities.label.table", "modalities.label.map") for n in origin["taken"])
        return
    for old, place in enumerate(places):
        if place is not None:
            one, other = source.model.modalities["label"].table, new.model.modalities["label"].table
            assert torch.equal(other[place], one[old])


def test_a_modality_of_another_class_is_new(tmp_path: Path) -> None:
    depth = {"kind": "dense", "channels": 1, "size": 8}
    _, _, origin = moved(tmp_path / "source", {"other": depth}, {"other": {"kind": "image", "channels": 1, "size": 8}})
    names = [name for name in origin["new"] if ".other." in name]
    assert names and all(name in origin["left"] for name in names)  # the same names and shapes
    assert origin["partly"]["backbone.flags.0.weight"] == "inputs: 2 taken, 2 new, 2 left out"


@pytest.mark.parametrize("other", [{"patch_size": 2}, {"block_out_channels": [4, 8]}])
def test_layers_of_another_shape_stay_as_drawn(other: dict, tmp_path: Path) -> None:
    source = objective({"label": label("abc")}, 1)
    source.model.save_pretrained(tmp_path / "source")
    new, fresh = (objective({"label": label("abc")}, 2, **{**LAYERS, **other}) for _ in range(2))
    origin = initialize(new, str(tmp_path / "source"), print)
    name = "backbone.unet.conv_in.weight"
    assert name in origin["new"] and name in origin["left"]
    assert torch.equal(new.model.state_dict()[name], fresh.model.state_dict()[name])


def test_learned_schedules_of_a_pipeline_are_taken(tmp_path: Path) -> None:
    source = objective({"label": label("abc")}, 1)
    weights = {"label": {"schedule": "learned", "parameters": [k / 8 for k in range(16)], "log_scale": 0.5}}
    scheduler = MTDiffusionScheduler(num_train_timesteps=20, weights=weights)
    MTDiffusionPipeline(model=source.model, scheduler=scheduler).save_pretrained(tmp_path / "source")
    new = objective({"label": label("abc"), "area": MASK}, 2)
    before = new.schedule_shapes["area"].clone()
    initialize(new, str(tmp_path / "source"), print)
    assert new.schedule_shapes["label"].tolist() == weights["label"]["parameters"]
    assert new.schedule_scales["label"].item() == 0.5 and torch.equal(new.schedule_shapes["area"], before)


# ------------------------------------------------------------------------------------------------------------ real runs


def test_a_run_gives_its_schedules_and_uncertainty(configure: Callable[..., Config], tmp_path: Path) -> None:
    settings = ["loss.uncertainty=true", "modalities.label.weight.schedule=learned", "train.learning_rate=1e-2"]
    old = train(configure(*settings, f"output={tmp_path / 'old'}"), progress=False)
    more = ["train.learning_rate=1e-12", f"output={tmp_path / 'new'}", f"train.initialize_from={old}"]
    new = train(configure(*settings, *more), progress=False)
    files = [run / "checkpoints" / "step-6" / "ema.safetensors" for run in (old, new)]
    one, other = map(load_file, files)
    for name in ("schedule_shapes.label", "log_std.weight", "log_std.bias"):
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-6)
        assert name in json.loads((new / "origin.json").read_text())["taken"]
    assert one["log_std.bias"].any()


# -------------------------------------------------------------------------------------------------------- bad sources


def _edit_json(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def _poison(folder: Path, value: float) -> None:
    file = folder / "model" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["modalities.label.table"][0, 0, 0, 0] = value
    save_file(tensors, file)


def _widen(folder: Path) -> None:
    config = json.loads((folder / "model" / "config.json").read_text())["modality_config"]
    config["label"] = label("abcd")
    _edit_json(folder / "model" / "config.json", modality_config=config)


def _schedule(folder: Path, **entry: Any) -> None:
    _edit_json(folder / "scheduler" / "scheduler_config.json", weights={"label": {"schedule": "learned", **entry}})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (lambda f: _poison(f, float("nan")), "model.safetensors.*label.table is not finite"),
    "infinity": (lambda f: _poison(f, float("inf")), "model.safetensors.*label.table is not finite"),
    "other classes": (_widen, "do not belong together: .*label"),
    "no config": (lambda f: (f / "model" / "config.json").unlink(), "config.json.*cannot be read"),
    "a list": (lambda f: (f / "model" / "config.json").write_text("[]"), "config.json.*no mapping"),
    "empty": (lambda f: (f / "model" / "config.json").write_text("{}"), "config.json.*cannot be built"),
    "unknown kind": (
        lambda f: _edit_json(f / "model" / "config.json", modality_config={"image": {"kind": "smell"}}),
        "cannot be built: .*smell",
    ),
    "unknown setting": (
        lambda f: _edit_json(f / "model" / "config.json", modality_config={"image": {**IMAGE, "smell": 1}}),
        "cannot be built: .*smell",
    ),
    "a huge network": (
        lambda f: _edit_json(f / "model" / "config.json", backbone_config={"kind": "unet", "norm_num_groups": 10**9}),
        "cannot be built: .*norm_num_groups",
    ),
    "code of others": (
        lambda f: _edit_json(f / "model" / "config.json", modality_config={"image": {"kind": "os:system"}}),
        "code of its author's.*--trust-custom-modalities",
    ),
    "words": (lambda f: _schedule(f, parameters=["x"]), "scheduler_config.json.*weights.label"),
    "not finite": (lambda f: _schedule(f, parameters=[float("nan")] * 16), "scheduler_config.json.*label.parameters"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_source_that_cannot_be_trusted_is_one_line(damage: str, tmp_path: Path) -> None:
    source, new = objective({"label": label("abc")}, 1), objective({"label": label("abc")}, 2)
    MTDiffusionPipeline(model=source.model, scheduler=source.scheduler).save_pretrained(tmp_path / "source")
    spoil, message = DAMAGES[damage]
    spoil(tmp_path / "source")
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    with pytest.raises(InputError, match=f"^train.initialize_from = .*{message}"):
        initialize(new, str(tmp_path / "source"), print)
    assert all(torch.equal(before[name], tensor) for name, tensor in new.state_dict().items())


def test_nothing_is_made_where_nothing_fits(configure: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = objective({"other": label("abc")}, 1)
    source.model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "diffusion_pytorch_model.safetensors"
    save_file({"modalities.other.table": load_file(file)["modalities.other.table"]}, file)
    with pytest.raises(InputError, match="holds no tensor that fits"):
        train(configure(f"train.initialize_from={tmp_path / 'source'}"), progress=False)
    assert not (tmp_path / "run").exists()
