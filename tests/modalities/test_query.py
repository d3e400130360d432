"""An image set that is asked: the context of another observed modality says which of its photos matter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from networks import LAYERS, alive, random_model
from PIL import Image as PILImage
from refusals import refused
from torch import Tensor

from mmdiff.build import build
from mmdiff.config import parse_config
from mmdiff.modalities import ImageSet, Shape
from mmdiff.modalities.contract import check_modality
from mmdiff.model import MTDiffusionModel
from mmdiff.objective import BatchPosition, MTObjective
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.sampling.guidance import branches_of
from mmdiff.schedulers import MTDiffusionScheduler
from mmdiff.states import StateProbabilities
from mmdiff.training import train
from mmdiff.training.initialize import initialize

Cli = Callable[..., Any]
IMAGE = {"kind": "image", "channels": 3, "size": 16}
LABEL = {"kind": "label", "num_classes": 3, "observe_as": "context"}
PHOTOS = {
    "kind": "image_set",
    "channels": 3,
    "size": 16,
    "max_images": 3,
    "dim": 8,
    "hidden": 8,
    "encoder": {"kind": "convolutions"},
}
ASKED = PHOTOS | {"fusion": "query_attention", "query": "label"}
CLASSES = torch.tensor([0, 1, 2, 0])


def model_of(seed: int = 0, **modalities: dict[str, Any]) -> MTDiffusionModel:
    """With large weights of the query, so that it matters."""
    model = random_model({"image": IMAGE, "label": LABEL} | modalities, seed)
    with torch.no_grad():
        for modality in model.modalities.values():
            for weight in getattr(modality, "query_weights", ()) if getattr(modality, "query", None) else ():
                modality.get_parameter(weight).mul_(20)
    return model


def photos_of(model: MTDiffusionModel, name: str = "photos") -> Tensor:
    return model.modalities[name].examples(4, torch.Generator().manual_seed(1))


def contexts(model: MTDiffusionModel, values: dict[str, Tensor], **observed: list[bool]) -> dict[str, Tensor]:
    """{modality: its part of the backbone's flags}."""
    flags = {name: torch.tensor(own) for name, own in observed.items()}
    seen = model.observation(values, {}, flags, like=torch.zeros(4, *model.space))
    widths = [2 + modality.context_width for modality in model.modalities.values()]
    return dict(zip(model.names, seen.flags.split(widths, dim=1), strict=True))


EVERY, SOME = [True] * 4, [True, False, True, False]


@torch.no_grad()
def test_what_is_observed_asks_and_what_is_absent_leaves_plain_attention() -> None:
    model, plain = model_of(photos=ASKED), model_of(photos=PHOTOS)
    state = {name: weight for name, weight in model.state_dict().items() if not name.endswith("fusion.W.weight")}
    plain.load_state_dict(state)
    values = {"photos": photos_of(model), "label": CLASSES}
    found = contexts(model, values, photos=EVERY, label=SOME)["photos"]
    nobody = contexts(plain, values, photos=EVERY, label=SOME)["photos"]
    every = contexts(model, values, photos=EVERY, label=EVERY)["photos"]
    torch.testing.assert_close(found[[1, 3]], nobody[[1, 3]], rtol=0, atol=0)
    torch.testing.assert_close(found[[0, 2]], every[[0, 2]], rtol=0, atol=0)
    several = values["photos"][:, :, -1, 0, 0].sum(dim=1) > 1
    assert (every - nobody).abs().amax(dim=1)[several].min() > 1e-4 and several.any()
    other = contexts(model, values | {"label": (CLASSES + 1) % 3}, photos=EVERY, label=EVERY)["photos"]
    assert (every - other).abs().amax(dim=1)[several].min() > 1e-4
    assert torch.equal(contexts(model, {"photos": values["photos"]}, photos=EVERY)["photos"], nobody)
    named = torch.nn.functional.one_hot(CLASSES, 3) * 3**0.5
    asked = model.modalities["photos"].asked(named).context(values["photos"])
    torch.testing.assert_close(every[:, 2:], asked, rtol=0, atol=0)


@pytest.mark.parametrize("width", [0, 5])
def test_it_keeps_the_contract(width: int) -> None:
    settings = {name: value for name, value in ASKED.items() if name != "kind"}
    shape = Shape((3, 16, 16), 6, 10, query=width)
    assert [finding for finding in check_modality(lambda own: ImageSet(own, **settings), shape) if finding.fault] == []


@torch.no_grad()
def test_a_set_may_ask_a_set() -> None:
    """And a change of what the first is asked reaches the last."""
    model = model_of(photos=ASKED, apart=ASKED | {"query": "photos"})
    assert model.modalities["apart"].shape.query == 8
    values = {"photos": photos_of(model), "apart": photos_of(model, "apart").flip(0), "label": CLASSES}
    values["photos"][:] = values["photos"][values["photos"][:, :, -1, 0, 0].sum(dim=1).argmax()]
    values["apart"][:] = values["apart"][values["apart"][:, :, -1, 0, 0].sum(dim=1).argmax()]
    every = {"photos": EVERY, "apart": EVERY}
    one = contexts(model, values, label=EVERY, **every)["apart"]
    assert (one - contexts(model, values, **every)["apart"]).abs().max() > 1e-6


@torch.no_grad()
def test_guidance_leaves_the_query_out_with_its_condition() -> None:
    model = model_of(photos=ASKED)
    values = {"photos": photos_of(model), "label": CLASSES}
    like = torch.zeros(4, *model.space)
    branches = branches_of(model, values, (), ("label", "photos"), ("label",), like=like)
    everywhere = {"photos": torch.ones(4, dtype=torch.bool)}
    alone = model.observation({"photos": values["photos"]}, {}, everywhere, like=like)
    assert torch.equal(branches.observation.flags[4:], alone.flags)


@pytest.mark.parametrize(
    ("modalities", "place", "value", "fact"),
    [
        ({"photos": ASKED | {"query": "colour"}}, "photos.query", "colour", "image, label"),
        ({"photos": ASKED | {"query": "photos"}}, "photos.query", "photos", "image, label"),
        ({"photos": ASKED | {"query": "image"}}, "photos.query", "image", "context"),
        ({"photos": ASKED, "label": LABEL | {"observe_as": "channels"}}, "photos.query", "label", "observe_as"),
        ({"photos": ASKED | {"query": "more"}, "more": ASKED | {"query": "photos"}}, "more.query", "photos", "circle"),
        ({"photos": ASKED | {"query": None}}, "photos.query", None, "query_attention"),
        ({"photos": ASKED | {"fusion": "attention"}}, "photos.fusion", "attention", "query_attention"),
    ],
)
def test_a_query_that_cannot_be_is_refused(modalities: dict[str, Any], place: str, value: Any, fact: str) -> None:
    with refused(f"modalities.{place}", value, fact):
        model_of(**modalities)


def test_what_is_never_observed_cannot_ask() -> None:
    modalities = {"image": IMAGE, "label": LABEL, "photos": ASKED}
    with refused("modalities.photos.query", "label", "observed"):
        MTDiffusionModel(modalities, {"kind": "unet", **LAYERS}, observable=["photos"])


# ----------------------------------------------------------------------------------------------------------- as a user


@pytest.fixture
def tree(tiny: dict[str, Any]) -> dict[str, Any]:
    tiny["data"] = {
        "source": "shapes",
        "options": {"rows": 24, "validation_rows": 12, "size": 16, "image_sets": {"views": [2, 3]}},
        "columns": {"image": "front", "image_set": "photos", "label": "kind"},
        "cache_mib": 0,
    }
    sets = {"kind": "image_set", "dim": 8, "hidden": 8, "fusion": "query_attention", "query": "label"}
    tiny["modalities"]["image_set"] = sets | {"states": {"observed": 0.7}}
    tiny["modalities"]["label"] |= {"observe_as": "context", "states": {"observed": 0.5}}
    tiny["train"] |= {"batch_size": 4, "steps": 2}
    return tiny


def test_the_query_learns_and_is_part_of_the_graph_where_nobody_asks(tree: dict[str, Any]) -> None:
    experiment = build(parse_config(tree))
    alive(experiment.model)
    batch = experiment.train.batch(range(16))
    where = BatchPosition(0, torch.arange(16), 16)
    weight = experiment.model.modalities["image_set"].get_parameter("fusion.W.weight")
    experiment.objective(batch, where).loss.backward()
    assert weight.grad is not None and weight.grad.any()
    weight.grad, batch.present["label"][:] = None, False
    experiment.objective(batch, where).loss.backward()
    assert weight.grad is not None and not weight.grad.any()


def test_it_is_trained_asked_and_evaluated(tree: dict[str, Any], cli: Cli, tmp_path: Path) -> None:
    run = train(parse_config(tree))
    pipe = MTDiffusionPipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    modality = pipe.model.modalities["image_set"]
    torch.nn.init.normal_(modality.get_parameter("fusion.W.weight"), std=20)
    levels = [10, 120, 250]
    photos = [PILImage.new("RGB", (16, 16), (level, 255 - level, 7)) for level in levels]
    value, steps = modality.preprocess(photos)[None], {"num_inference_steps": 1}

    def weights(**more: Any) -> Tensor:
        conditioning = more.pop("conditioning", None)
        return pipe(observed={"image_set": [photos], **more}, conditioning=conditioning, **steps).weights["image_set"]

    asked = modality.asked(pipe.model.modalities["label"].context(torch.tensor([3]))).weights(value)
    torch.testing.assert_close(weights(label=3), asked, rtol=0, atol=0)
    assert torch.equal(weights(), modality.weights(value)) and not torch.allclose(weights(), asked)
    by_mean = {"image_set": "concatenation", "label": "aggregation"}  # the network does not see the label then
    assert torch.equal(weights(label=3, conditioning=by_mean), weights())

    for index, photo in enumerate(photos):
        photo.save(tmp_path / f"{index}.png")
    files = ",".join(str(tmp_path / f"{index}.png") for index in range(3))
    observed = ("--observe", f"image_set={files}", "--observe", "label=3")
    answer = cli("sample", run, *observed, "--num", 2, "--steps", 1, "--out", tmp_path / "grid.png")
    assert answer.code == 0 and "grid-image_set.png" in answer.out, answer.err
    answer = cli("evaluate", run, "evaluate.num_samples=8", "evaluate.features=pixels", "--steps", "1", "--subsets")
    assert answer.code == 0 and "image_set + label → image" in answer.out, answer.out + answer.err


def test_the_command_line_refuses_in_one_line(tree: dict[str, Any], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(tree))
    for change, key in (("query=colour", "query"), ("query=3", "query"), ("fusion=mean", "fusion")):
        answer = cli("train", tmp_path / "asked.yaml", f"modalities.image_set.{change}")
        assert answer.code != 0 and f"modalities.image_set.{key}" in answer.err and "Traceback" not in answer.err


def test_fine_tuning_matches_the_query_by_the_names_of_classes(tmp_path: Path) -> None:
    def objective(names: str, seed: int) -> MTObjective:
        label = LABEL | {"num_classes": len(names), "names": list(names)}
        model = model_of(seed, label=label, photos=ASKED)
        chances = {name: StateProbabilities(0.0, 0.5) for name in model.names}
        return MTObjective(model, MTDiffusionScheduler(num_train_timesteps=20), chances, {"label": 1.0})

    source, new = objective("abc", 1), objective("cxab", 2)
    MTDiffusionPipeline(model=source.model, scheduler=source.scheduler).save_pretrained(tmp_path)
    initialize(new, str(tmp_path), print)
    one, other = (o.model.modalities["photos"].get_parameter("fusion.W.weight") for o in (source, new))
    torch.testing.assert_close(other[:, [2, 3, 0]] * 4**0.5, one * 3**0.5, rtol=1e-5, atol=1e-6)
