"""A model at another size than its config's: the same weights compute what a model of that size computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import LAYERS, alive
from refusals import refused
from torch import Generator

from mmdiff.model import MTDiffusionModel
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.schedulers import MTDiffusionScheduler

WEIGHTED = ("mask", "label", "embedding", "vector", "depth")


def modalities(height: int, width: int) -> dict[str, dict[str, Any]]:
    """One of every kind; maps are as large as the image, or half as large."""
    size, half = [height, width], [height // 2, width // 2]
    return {
        "image": {"kind": "image", "channels": 3, "size": size},
        "mask": {"kind": "mask", "num_classes": 4, "size": half},
        "masked_image": {"kind": "masked_image", "channels": 3, "size": size},
        "label": {"kind": "label", "num_classes": 3, "table_size": 4},
        "embedding": {"kind": "embedding", "dim": 5, "log_norm_mean": 1.0, "log_norm_std": 0.2, "map_size": 2},
        "vector": {"kind": "vector", "dim": 2, "mean": [0, 0], "std": [1, 1], "map_size": 2},
        "depth": {"kind": "dense", "channels": 1, "size": size, "mean": 5.0, "std": 2.0},
        "photos": {
            "kind": "image_set",
            "channels": 3,
            "size": 8,
            "max_images": 2,
            "encoder": {"kind": "convolutions"},
            "observe_as": "channels",
            "map_size": 4,
        },
    }


BACKBONES = {
    "unet": {"kind": "unet", **LAYERS, "pooled_grid": 2, "context_grid": 2},
    "dit": {"kind": "dit", "depth": 2, "width": 16, "heads": 2, "patch_size": 2, "decoder_depth": 1},
}


def of(modality_config: dict[str, Any], backbone: dict[str, Any]) -> MTDiffusionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return alive(MTDiffusionModel(modality_config, backbone))


@pytest.fixture(scope="module", params=BACKBONES.values(), ids=BACKBONES)
def model(request: pytest.FixtureRequest) -> MTDiffusionModel:
    return of(modalities(16, 16), request.param)


def pipeline(model: MTDiffusionModel) -> MTDiffusionPipeline:
    weights = {name: {"schedule": "bump", "scale": 0.5} for name in WEIGHTED if name in model.names}
    pipe = MTDiffusionPipeline(model=model, scheduler=MTDiffusionScheduler(num_train_timesteps=20, weights=weights))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_at_its_own_size_it_is_itself(model: MTDiffusionModel) -> None:
    assert model.of_size() is model is model.of_size(16, 16)
    other = model.of_size(24, 8)
    assert {id(p) for p in other.parameters()} == {id(p) for p in model.parameters()}
    assert model.space == (3, 16, 16) and model.modalities["mask"].value_shape == (8, 8)


@pytest.mark.parametrize("size", [(24, 8), (8, 24)])
def test_it_is_the_model_of_that_size(model: MTDiffusionModel, size: tuple[int, int]) -> None:
    """Encodings, observations, and samples with and without conditions, bit by bit."""
    built = of(modalities(*size), model.config.backbone_config)
    built.load_state_dict(model.state_dict())
    view = model.of_size(*size)
    values = {name: one.examples(2, Generator().manual_seed(0)) for name, one in built.modalities.items()}
    for name, value in values.items():
        view.modalities[name].check(value)
        for method in ("encode", "observe", "context"):
            ours, theirs = (getattr(m.modalities[name], method)(value) for m in (view, built))
            assert torch.equal(ours, theirs), (name, method)
    del values["image"]
    for observed in ({}, values):
        arguments = {"batch_size": 2, "observed": observed, "num_inference_steps": 2, "output_type": "pt"}
        ours = pipeline(model)(**arguments, height=size[0], width=size[1], generator=Generator().manual_seed(1))
        theirs = pipeline(built)(**arguments, generator=Generator().manual_seed(1))
        assert all(torch.equal(ours.samples[name], value) for name, value in theirs.samples.items())


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"height": 17}, "height and width"),
        ({"height": 18}, "height and width"),
        ({"width": 0}, "width"),
        ({"height": 2.5}, "height"),
        ({"width": "wide"}, "width"),
    ],
)
def test_other_sizes_are_refused(arguments: dict[str, Any], key: str) -> None:
    model = of({"image": {"kind": "image", "channels": 1, "size": 16}}, {"kind": "unet", **LAYERS, "patch_size": 2})
    with refused(key):
        pipeline(model)(1, **arguments)


def test_the_command_line_draws_and_reads_at_another_size(all_kinds: Path, tmp_path: Path, cli: Any) -> None:
    """What it saves at a size it reads at that size, cut and resized from any other."""
    folder = tmp_path / "drawn"
    sized = ["--num", 2, "--steps", 2, "--height", 16, "--width", 8]
    answer = cli("sample", all_kinds, *sized, "--save-each", folder, "--out", tmp_path / "a.png")
    assert answer.code == 0, answer.err
    masks = f"mask={folder}/mask/0000.png"
    again = ["--save-each", tmp_path / "b", "--out", tmp_path / "b.png"]
    answer = cli("sample", all_kinds, *sized, "--observe", masks, *again)
    assert answer.code == 0, answer.err
    read = (tmp_path / "b" / "mask" / "0001.png").read_bytes()
    assert read == (folder / "mask" / "0000.png").read_bytes()
    assert cli("sample", all_kinds, "--height", 9, "--out", tmp_path / "c.png").complaint.startswith("height and width")
