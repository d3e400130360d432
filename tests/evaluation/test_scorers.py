"""Scorers against other routes, and real images in place of samples: what is right scores high, what is not, chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score
from torch import Tensor

from mmdiff.build import Experiment, build
from mmdiff.config import parse_config
from mmdiff.evaluation.evaluator import Evaluator
from mmdiff.evaluation.report import Evaluation, Row, table
from mmdiff.evaluation.scorers import scorer
from mmdiff.modalities import Dense, Embedding, Image, Label, Mask, MaskedImage, Modality, Shape
from mmdiff.pipeline import MTDiffusionPipeline

SHAPE = Shape(space=(3, 8, 8), features=8, pooled=12)


class Halved(Dense):
    """As a user would derive one."""


def values(modality: Modality, count: int, seed: int) -> Tensor:
    return modality.examples(count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "modality",
    [
        Label(SHAPE, num_classes=4),
        Mask(SHAPE, num_classes=4, size=8),
        Embedding(SHAPE, dim=16),
        Dense(SHAPE, channels=2, size=8),
        Halved(SHAPE, channels=2, size=8),
        Image(SHAPE, channels=3, size=16),
    ],
    ids=lambda modality: type(modality).__name__,
)
def test_the_truth_scores_best(modality: Modality) -> None:
    best = {"RMSE": 0.0, "PSNR": 100.0}
    truth, other = values(modality, 30, 0), values(modality, 30, 1)
    score = scorer(modality)
    assert score is not None
    name = next(iter(score(modality, truth, truth)))
    equal, wrong = (score(modality, found, truth)[name] for found in (truth, other))
    assert equal == pytest.approx(best.get(name, 1.0), abs=1e-6)
    assert wrong > 0.1 if name == "RMSE" else wrong < 0.9 * equal


def test_what_is_not_compared_has_no_scorer() -> None:
    assert scorer(MaskedImage(SHAPE, channels=3, size=8)) is None
    label, dense = Label(SHAPE, num_classes=4), Halved(SHAPE, channels=1, size=8)
    assert scorer(dense) is scorer(Dense(SHAPE, channels=1, size=8)) is not scorer(label)


def test_each_kind_is_scored_by_its_own_measure() -> None:
    label, mask = Label(SHAPE, num_classes=4), Mask(SHAPE, num_classes=3, size=8, ignore=9)
    found, truth = values(label, 50, 0), values(label, 50, 1)
    assert scorer(label)(label, found, truth)["accuracy"] == pytest.approx(accuracy_score(truth, found))
    found, truth = values(mask, 20, 0), values(mask, 20, 1)
    truth[:, :3] = 9  # unlabelled pixels count nothing
    kept = truth != 9
    expected = jaccard_score(truth[kept], found[kept], average="macro")
    assert scorer(mask)(mask, found, truth)["mIoU"] == pytest.approx(expected)
    dense = Halved(SHAPE, channels=2, size=8, mean=5.0, std=3.0)
    found, truth = values(dense, 20, 0), values(dense, 20, 1)
    rmse = np.sqrt(((found - truth).numpy() ** 2).reshape(20, -1).mean(axis=1)).mean()  # in the data's own units
    assert scorer(dense)(dense, found, truth)["RMSE"] == pytest.approx(float(rmse), rel=1e-5)
    assert 3.0 < rmse < 6.0  # √2 · std for independent values


@pytest.mark.parametrize(
    ("settings", "names"),
    [({"names": ["sky", "sea", "owl"]}, ["sky", "sea", "owl"]), ({"values": [0, 128, 255]}, ["0", "128", "255"])],
)
def test_the_iou_of_a_class_is_told_by_its_name(settings: dict[str, Any], names: list[str]) -> None:
    mask = Mask(SHAPE, num_classes=3, size=8, **settings)
    truth = torch.zeros(4, 8, 8, dtype=torch.int64)
    truth[:, :4] = 1
    found = truth.roll(1, dims=1)  # a row of eight is wrong on both sides
    scores = scorer(mask)(mask, found, truth)
    assert scores["IoU per class"] == {names[0]: pytest.approx(0.6), names[1]: pytest.approx(0.6), names[2]: None}
    rows = [Row("image → mask", "mask", {"seed": seed}, scores) for seed in range(2)]
    shown = table(Evaluation({}, rows))
    assert f"{names[0]} 0.600" in shown and f"{names[2]} –" in shown
    assert sum("IoU per class" in line for line in shown.splitlines()) == 1


# ------------------------------------------------------------------------------------ real images in place of samples


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    kinds = {name: {"kind": name} for name in ("image", "mask", "label", "embedding")}
    tree: dict[str, Any] = {
        "name": "tiny",
        "data": {"source": "shapes", "options": {"rows": 256, "validation_rows": 128, "size": 16}},
        "modalities": kinds,
        "backbone": {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8},
        "evaluate": {"features": "pixels"},
    }
    return build(parse_config(tree))


@pytest.fixture(scope="module")
def scene(experiment: Experiment) -> Evaluator:
    pipeline = MTDiffusionPipeline(model=experiment.model.eval(), scheduler=experiment.scheduler)
    return Evaluator(pipeline, experiment.config, experiment.train, experiment.validation, trust=False)


@pytest.fixture(scope="module")
def held_out(experiment: Experiment) -> dict[str, Tensor]:
    return experiment.validation.all().values


def scored(
    scene: Evaluator, drawn: dict[str, Tensor], given: dict[str, Tensor] | None = None
) -> dict[str, dict[str, Any]]:
    return {row.of: row.scores for row in scene._scored("joint", {}, drawn, given or {})}


@pytest.mark.parametrize("way", ["drawn", "given"])
def test_real_images_agree_with_their_own_values(scene: Evaluator, held_out: dict[str, Tensor], way: str) -> None:
    if way == "drawn":
        found = scored(scene, held_out)
    else:  # what was given counts, not the model's own reading
        found = scored(scene, {n: v if n == "image" else v.roll(1, 0) for n, v in held_out.items()}, held_out)
    assert found["label"]["agreement"] >= 0.99
    assert found["mask"]["mIoU"] >= 0.95 and found["mask"]["pixel agreement"] >= 0.99
    assert found["embedding"]["retrieval@1 among 64"] >= 0.9 and found["embedding"]["cosine"] >= 0.9
    assert found["label"]["class shares"] == pytest.approx(np.bincount(held_out["label"], minlength=5) / 128)
    image = found["image"]
    assert image["n"] == image["FID rows"] == 128
    assert image["FID, real against real"] > 0 and image["FID"] < 1.3 * image["FID, real against real"]
    assert abs(image["KID"] - image["KID, real against real"]) < 5 * max(image["KID spread"], 0.01)
    assert image["memorised"] == pytest.approx(image["memorised, expected"], abs=0.02)  # these rows made the median


def test_values_of_other_rows_agree_by_chance(scene: Evaluator, held_out: dict[str, Tensor]) -> None:
    shuffled = {name: value if name == "image" else value.roll(7, 0) for name, value in held_out.items()}
    last = {f"{name}/last": held_out[name] for name in scene.judges}
    found = scored(scene, shuffled | last)
    assert 0.05 < found["label"]["agreement"] < 0.35  # 1/5, standard error 0.035
    assert found["mask"]["mIoU"] < 0.4  # background is most of every image
    assert found["embedding"]["retrieval@1 among 64"] < 0.1
    # the last draws are judged by themselves
    assert found["label"]["of last draw"] >= 0.99
    assert found["mask"]["of last draw"] >= 0.95 and found["embedding"]["of last draw"] >= 0.9


def test_copies_are_memorised_and_noise_is_far(scene: Evaluator, experiment: Experiment) -> None:
    copies = experiment.train.all(100).values["image"]
    assert scene._image_scores(copies)["memorised"] == 1.0
    noise = torch.rand(100, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = scene._image_scores(noise)
    assert found["memorised"] == 0.0
    assert found["FID"] > 5 * found["FID, real against real"] and found["KID"] > 10 * abs(
        found["KID, real against real"]
    )
    one_image = copies[:1].expand(100, -1, -1, -1)
    collapsed = scene._image_scores(one_image)
    assert collapsed["std over samples"] == 0 and collapsed["FID"] > 3 * collapsed["FID, real against real"]
