"""A set of images conditions a model: encoders, gaps, what is refused, weights that come out of the pipeline."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import open_clip
import pytest
import torch
from networks import alive, random_model
from PIL import Image as PILImage
from torch import Generator, Tensor

from mmdiff.build import build
from mmdiff.config import Config, parse_config
from mmdiff.data import Table
from mmdiff.errors import InputError
from mmdiff.modalities import ImageSet, Shape
from mmdiff.modalities.contract import check_modality
from mmdiff.modalities.encoders import POOLS, ClipTower, Convolutions
from mmdiff.modalities.fusion import FUSIONS
from mmdiff.model import MTDiffusionModel
from mmdiff.objective import BatchPosition
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.plots import set_weights
from mmdiff.sampling.guidance import branches_of, guided
from mmdiff.schedulers import MTDiffusionScheduler
from mmdiff.training import train

Cli = Callable[..., Any]
SHAPE = Shape((3, 16, 16), 6, 10)
CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 24, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
NAME = "tiny-image-sets"
SOURCE = '''
import torch
from torch import nn

CALLS = []


class Average(nn.Module):
    """The mean colour, and its square."""

    def __init__(self, factor=1.0):
        super().__init__()
        CALLS.append(factor)
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, images):
        mean = self.factor * images.mean(dim=(2, 3))
        return torch.cat([mean, mean.square()], dim=1)


class Map(Average):
    def forward(self, images):
        return images


def number():
    return 3


nothing = None
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The import path of a module of a user's."""
    name = "vision_of_a_user"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def clip(tmp_path: Path) -> str:
    """A tiny model that open_clip knows by name."""
    (tmp_path / f"{NAME}.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(tmp_path / f"{NAME}.json")
    return NAME


def image_set(**settings: Any) -> ImageSet:
    torch.manual_seed(0)
    return ImageSet(SHAPE, **{"channels": 3, "size": 16, "max_images": 4, "dim": 8, **settings})


def values(count: int = 5) -> Tensor:
    return image_set().examples(count, Generator().manual_seed(1))


def photo(level: int, size: int = 16) -> PILImage.Image:
    return PILImage.new("RGB", (size, size), (level, 255 - level, 7))


# ---------------------------------------------------------------------------------------------------------- the value


@pytest.mark.parametrize("fusion", FUSIONS)
def test_order_and_what_stands_in_gaps_change_nothing(fusion: str) -> None:
    modality, value = image_set(fusion=fusion).double(), values().double()
    there = value[:, :, -1:, :1, :1] > 0
    filled = torch.where(there, value, torch.cat([7 + value[:, :, :-1], value[:, :, -1:]], dim=2))
    assert not torch.equal(filled, value)
    assert torch.equal(modality.context(filled), modality.context(value))
    images = [photo(level) for level in (10, 90, 200)]
    one, other = (modality.preprocess(raw).double()[None] for raw in (images, images[::-1]))
    torch.testing.assert_close(modality.context(one), modality.context(other), rtol=1e-12, atol=1e-12)
    weights, back = modality.weights(one).detach(), modality.weights(other).detach()
    torch.testing.assert_close(weights[:, :3], back[:, :3].flip(1), rtol=1e-12, atol=1e-12)
    assert weights.shape == (1, 4) and weights[0, 3] == 0 and float(weights.sum()) == pytest.approx(1)


def test_a_larger_limit_changes_nothing() -> None:
    small, large = image_set(), image_set(max_images=9)
    raw = [photo(40), photo(250)]
    first, second = small.preprocess(raw)[None], large.preprocess(raw)[None]
    assert torch.equal(small.context(first), large.context(second))
    assert torch.equal(small.weights(first)[0, :2], large.weights(second)[0, :2])


def test_missing_images_are_left_out() -> None:
    modality = image_set()
    assert torch.equal(modality.preprocess([None, photo(1), None, photo(2)]), modality.preprocess([photo(1), photo(2)]))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (photo(1), r"'one image': needs a list of images; one set alone is \[\[photo, photo\]\]"),
        ([None], "'0 images': needs 1 … 4"),
        ([photo(1)] * 5, "'5 images': needs 1 … 4; see max_images"),
        ([photo(1), photo(1, 8)], "'8x8': expected 16x16; or set resize: true"),
        (3, "'int': is no list of images"),
    ],
)
def test_what_is_no_set_is_refused(raw: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        image_set().preprocess(raw)


def test_values_are_checked() -> None:
    modality, value = image_set(), values()
    for change, message in (
        (lambda v: v.flip(1), "its images before what is empty"),
        (lambda v: torch.cat([v[:, :, :-1], 0 * v[:, :, -1:]], dim=2), "one image at least"),
        (lambda v: torch.cat([v[:, :, :-1], 0.5 * v[:, :, -1:]], dim=2), "must be 1 where an image is"),
    ):
        with pytest.raises(InputError, match=message):
            modality.check(change(value))


def test_a_folder_several_pages_and_commas_are_read(tmp_path: Path) -> None:
    modality, photos = image_set(), [photo(10, 20), photo(120, 16)]
    (tmp_path / "set").mkdir()
    for index, image in enumerate(photos):
        image.save(tmp_path / "set" / f"{index}.png")
    wanted = modality.preprocess(modality.parse(f"{tmp_path}/set/0.png,{tmp_path}/set/1.png"))
    assert torch.equal(modality.preprocess(modality.parse(str(tmp_path / "set"))), wanted)
    (saved,) = modality.postprocess(wanted[None])
    assert torch.equal(modality.preprocess(modality.parse(str(modality.save(saved, tmp_path / "pages")))), wanted)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        modality.parse(str(tmp_path / "none"))


@pytest.mark.parametrize(
    "settings",
    [{"max_images": 0}, {"dim": 1}, {"observe_as": "map"}, {"map_size": 3}, {"fusion": "median"}, {"hidden": 0}],
    ids=str,
)
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(settings))} = "):
        image_set(**settings)


# ----------------------------------------------------------------------------------------------------------- encoders


def test_an_encoder_of_ones_own_keeps_the_contract(module: str) -> None:
    encoder = {"kind": f"{module}:Average", "factor": 2.0}
    assert [f for f in check_modality(lambda _: image_set(encoder=encoder), SHAPE) if f.fault] == []
    modality = image_set(encoder=encoder)
    assert modality.encoder.width == 6 and float(modality.encoder.network.factor) == 2.0


def test_convolutions_take_means_largest_values_or_both() -> None:
    images, found = torch.rand(3, 3, 16, 16), {}
    for pool in POOLS:
        torch.manual_seed(0)
        network = Convolutions(3, (8,), pool)
        found[pool] = network(images)
    maps = network.stages[0](images)  # (3, 8, 8, 8): the weights are those of all three
    torch.testing.assert_close(found["avg"], maps.mean(dim=(2, 3)))
    torch.testing.assert_close(found["max"], maps.amax(dim=(2, 3)))
    assert torch.equal(found["catavgmax"], torch.cat([found["avg"], found["max"]], dim=1))


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"kind": "alexnet"}, "encoder.kind = 'alexnet': choose one of resnet, convolutions, open_clip"),
        ({"kind": "{module}:Absent"}, "encoder.kind = .*must be a subclass of torch.nn.Module"),
        ({"kind": "{module}:nothing"}, "encoder.kind = .*must be a subclass of torch.nn.Module"),
        ({"kind": "{module}:number"}, "encoder.kind = .*must be a subclass of torch.nn.Module"),
        ({"kind": "{module}:Map"}, r"encoder = \(2, 3, 16, 16\): two images need features of shape \(2, d\)"),
        ({"kind": "{module}:Average", "power": 2}, "encoder = .*its settings do not fit"),
        ({"kind": "no_such_module_at_all:X"}, "encoder.kind = .*cannot be imported"),
        ({"kind": "convolutions", "pool": "median"}, "encoder.pool = 'median': choose one of avg, max, catavgmax"),
        ({"kind": "resnet", "name": "resnet17"}, "encoder.name = 'resnet17': no model of timm"),
        ({"kind": "open_clip", "model": "ViT-Z"}, "encoder.model = 'ViT-Z': no model of open_clip"),
    ],
    ids=str,
)
def test_encoders_that_do_not_fit_are_refused(encoder: dict[str, Any], message: str, module: str) -> None:
    with pytest.raises(InputError, match=message):
        image_set(encoder={**encoder, "kind": encoder["kind"].replace("{module}", module)})


def test_the_tower_of_open_clip_is_that_of_open_clip(clip: str, tmp_path: Path) -> None:
    """Same features as open_clip's own, from weights of a file."""
    torch.manual_seed(3)
    network = open_clip.create_model(clip)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    encoder = {"kind": "open_clip", "model": clip, "pretrained": str(tmp_path / "weights.pt"), "frozen": True}
    modality = image_set(encoder=encoder, size=24)
    modality.load_initial_weights()
    images = torch.rand(3, 3, 24, 24) * 2 - 1
    mean, std = (torch.tensor(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    expected = network.encode_image(((images + 1) / 2 - mean) / std)
    torch.testing.assert_close(modality.encoder(images), expected, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in modality.encoder.parameters())
    assert not modality.train().encoder.network.training
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    with pytest.raises(InputError, match="encoder.pretrained = .*cannot be loaded"):
        modality.load_initial_weights()
    (tmp_path / "weights.pt").unlink()
    with pytest.raises(InputError, match="encoder.pretrained = .*neither a checkpoint file nor a tag"):
        modality.load_initial_weights()


def test_a_tower_reads_images_of_another_size(clip: str) -> None:
    modality = image_set(encoder={"kind": "open_clip", "model": clip})
    assert isinstance(modality.encoder.network, ClipTower)
    assert modality.context(values()).shape == (5, 8)
    with pytest.raises(InputError, match="reads 3 channels, the images have 1"):
        image_set(encoder={"kind": "open_clip", "model": clip}, channels=1)


# ---------------------------------------------------------------------------------------------------------- in a model


@pytest.fixture
def tree(tiny: dict[str, Any]) -> dict[str, Any]:
    tiny["data"] = {
        "source": "shapes",
        "options": {
            "rows": 24,
            "validation_rows": 12,
            "size": 16,
            "image_sets": {"views": [1, 3], "distractors": [0, 0.5]},
        },
        "columns": {"image": "front", "image_set": "photos", "label": "kind"},
        "cache_mib": 0,
    }
    tiny["modalities"] |= {"image_set": {"kind": "image_set", "dim": 8, "hidden": 8, "states": {"observed": 0.7}}}
    tiny["train"] |= {"batch_size": 4, "steps": 2}
    return tiny


@pytest.fixture
def config(tree: dict[str, Any]) -> Config:
    return parse_config(tree)


def test_it_has_neither_head_nor_loss_and_is_trained(config: Config) -> None:
    experiment = build(config)
    model = experiment.model
    assert experiment.config.modalities["image_set"].settings()["max_images"] == 3
    assert model.auxiliary == ("image_set", "label") and model.generated == ("label",)
    for name, parameter in model.named_parameters():  # what a fresh network has as zeros lets no gradient through
        if not parameter.any() and "image_set" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    output = experiment.objective(experiment.train.batch(range(16)), BatchPosition(0, torch.arange(16), 16))
    assert {"l2/label"} == {name for name in output.terms if name.startswith("l2")}
    output.loss.backward()
    for name, parameter in model.modalities["image_set"].named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_an_absent_set_changes_nothing(config: Config) -> None:
    """Missing rows give the same loss whatever a data set left there."""
    experiment = build(config)
    batch = experiment.train.batch(range(6))
    batch.present["image_set"][:] = False
    where = BatchPosition(0, torch.arange(6), 6)
    loss = experiment.objective(batch, where).loss
    batch.values["image_set"][:] = torch.nan
    assert torch.equal(experiment.objective(batch, where).loss, loss)


def test_a_set_of_nothing_is_missing() -> None:
    columns = {"photos": [[photo(3), None], None, [], [None, None], [photo(1), photo(2)]]}
    features = datasets.Features({"photos": datasets.List(datasets.Image())})
    modality = image_set()
    table = Table(
        datasets.Dataset.from_dict(columns, features=features),
        columns={"image_set": "photos"},
        preprocess={"image_set": modality.preprocess},
        placeholders={"image_set": modality.placeholder()},
        is_missing={"image_set": modality.is_missing},
    )
    batch = table.all()
    assert batch.present["image_set"].tolist() == [True, False, False, False, True]
    assert torch.equal(batch.values["image_set"][0], modality.preprocess([photo(3)]))
    assert torch.equal(batch.values["image_set"][2], modality.placeholder())


def test_weighting_it_is_refused(tree: dict[str, Any]) -> None:
    tree["modalities"]["image_set"]["weight"] = {"schedule": "constant"}
    with pytest.raises(InputError, match="modalities.image_set.weight.schedule = 'constant': ImageSet is observed or"):
        build(parse_config(tree))


@torch.no_grad()
def test_classifier_free_guidance_of_what_has_no_head() -> None:
    """absent + s (observed − absent) of two separate forwards, and a pipeline call by name and for all."""
    sets = {"kind": "image_set", "channels": 3, "size": 16, "max_images": 3, "encoder": {"kind": "convolutions"}}
    image, label = {"kind": "image", "channels": 3, "size": 16}, {"kind": "label", "num_classes": 3}
    model = random_model({"image": image, "image_set": sets, "label": label}, std=0.3).eval()
    given = {"image_set": model.modalities["image_set"].examples(2, torch.Generator().manual_seed(0))}
    z_t, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([40, 900])
    branches = branches_of(model, given, (), ("image_set",), ("image_set",), like=z_t)
    found = guided(model, z_t, timesteps, branches, {"image_set": 2.5})
    everywhere = torch.ones(2, dtype=torch.bool)
    full, absent = (
        model(z_t, timesteps, model.observation(given, {}, seen, like=z_t)).prediction
        for seen in ({"image_set": everywhere}, {})
    )
    assert (full - absent).abs().max() > 1e-3  # the set matters
    torch.testing.assert_close(found.prediction, absent + 2.5 * (full - absent), rtol=1e-4, atol=1e-5)
    assert set(found.params) == {"label"} and found.unseen == {}
    pipe = MTDiffusionPipeline(model=model, scheduler=MTDiffusionScheduler())
    pipe.set_progress_bar_config(disable=True)
    by_name, by_all = (
        pipe(observed=given, guidance_scale=scale, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
        for scale in ({"image_set": 2.0}, 2.0)
    )
    assert by_name.samples["label"] == by_all.samples["label"] and len(by_name.samples["image"]) == 2


def test_sets_condition_and_their_weights_come_out(config: Config, cli: Cli, tmp_path: Path) -> None:
    run = train(config)
    pipe = MTDiffusionPipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    modality = pipe.model.modalities["image_set"]
    sets = [[photo(10), photo(200)], [photo(90)], [photo(1), photo(2), photo(3)]]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    out = pipe(observed={"image_set": sets}, num_inference_steps=2, generator=generators)
    assert set(out.samples) == {"image", "label", "image_set"}
    assert [len(one) for one in out.samples["image_set"]] == [2, 1, 3]
    value = torch.stack([modality.preprocess(one) for one in sets])
    assert torch.equal(out.weights["image_set"], modality.weights(value).detach())
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    parts = pipe(observed={"image_set": sets}, num_inference_steps=2, generator=generators, max_batch_size=2)
    torch.testing.assert_close(parts.weights["image_set"], out.weights["image_set"])
    joint = pipe(batch_size=2, num_inference_steps=1)
    assert set(joint.samples) == {"image", "label"} and joint.weights == {}
    read = pipe(observed={"image_set": sets[:1], "image": joint.samples["image"][:1]})
    assert set(read.samples) == {"image", "label", "image_set"}
    with pytest.raises(InputError, match="conditioning = 'head-guidance': cannot use observed image_set"):
        pipe(observed={"image_set": sets}, conditioning="head-guidance")

    for index, image in enumerate(sets[0]):
        image.save(tmp_path / f"{index}.png")
    files = f"image_set={tmp_path}/0.png,{tmp_path}/1.png"
    answer = cli("sample", run, "--observe", files, "--num", 2, "--steps", 1, "--out", tmp_path / "grid.png")
    assert answer.code == 0, answer.err
    assert f"wrote {tmp_path}/grid-image_set.png, each image with its weight" in answer.out
    answer = cli("evaluate", run, "evaluate.num_samples=8", "evaluate.features=pixels", "--steps", "1")
    assert answer.code == 0, answer.err
    assert "image_set → image" in answer.out and "image_set → label" in answer.out


def test_another_set_gives_another_image(config: Config) -> None:
    experiment = build(config)
    alive(experiment.model)
    pipe = MTDiffusionPipeline(model=experiment.model, scheduler=experiment.scheduler)
    pipe.set_progress_bar_config(disable=True)

    def drawn(raw: list[PILImage.Image]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": 1, "generator": generator, "output_type": "pt", "aggregate": False}
        return pipe(observed={"image_set": [raw]}, **arguments).samples["image"]

    one, other = drawn([photo(0), photo(1)]), drawn([photo(250)])
    assert not torch.allclose(one, other)
    torch.testing.assert_close(drawn([photo(1), photo(0)]), one, rtol=1e-4, atol=1e-5)


def test_encoders_of_others_are_imported_only_when_trusted(tree: dict[str, Any], module: str, tmp_path: Path) -> None:
    tree["modalities"]["image_set"]["encoder"] = {"kind": f"{module}:Average", "factor": 2.0}
    model = build(parse_config(tree)).model
    model.save_pretrained(tmp_path / "model")
    del sys.modules[module]
    message = "modalities.image_set.encoder.kind = .*pass trust_custom_modalities=True"
    with pytest.raises(InputError, match=message):
        MTDiffusionModel.from_pretrained(tmp_path / "model")
    assert module not in sys.modules
    loaded = MTDiffusionModel.from_pretrained(tmp_path / "model", trust_custom_modalities=True)
    assert float(loaded.modalities["image_set"].encoder.network.factor.detach()) == 2.0


def test_a_saved_model_needs_the_first_weights_no_more(tree: dict[str, Any], clip: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = open_clip.create_model(clip)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    encoder = {"kind": "open_clip", "model": clip, "pretrained": str(tmp_path / "weights.pt")}
    tree["modalities"]["image_set"]["encoder"] = encoder
    model = build(parse_config(tree)).model
    tower = model.modalities["image_set"].encoder.network.tower
    assert torch.equal(tower.proj, network.visual.proj)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "weights.pt").unlink()
    loaded = MTDiffusionModel.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.modalities["image_set"].encoder.network.tower.proj, network.visual.proj)
    with pytest.raises(InputError, match="modalities.image_set.encoder.pretrained = .*neither"):
        build(parse_config(tree))


def test_the_plot_shows_every_image(tmp_path: Path) -> None:
    sets = [[photo(10), photo(100)], [photo(200, 8)]]
    weights = torch.tensor([[0.9, 0.1, 0.0], [1.0, 0.0, 0.0]])
    one = PILImage.open(set_weights(sets, weights, tmp_path / "a" / "one.png")).copy()
    other = PILImage.open(set_weights(sets, 1 - weights, tmp_path / "other.png")).copy()
    assert one.size == other.size and one.tobytes() != other.tobytes()
    colours = {colour for _, colour in one.convert("RGB").getcolors(maxcolors=10**6)}
    assert {(10, 245, 7), (100, 155, 7), (200, 55, 7)} <= colours
