"""Restored images: known pixels are the truth, masks are the same for every model, scores against hand computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mmdiff.build import Experiment, build
from mmdiff.config import parse_config
from mmdiff.errors import InputError
from mmdiff.evaluation.draws import draw
from mmdiff.evaluation.holes import HoleScores
from mmdiff.pipeline import MTDiffusionPipeline

WEIGHTS = Path(__file__).parents[3] / "shared" / "data" / "weights"
SIZE = 16
# (pattern, ratio, largest unit in pixels: a square, a line, a cell, a pixel)
PATTERNS = {
    "tenth": ("squares", 0.1, (SIZE // 8) ** 2),
    "range": ("squares", [0.3, 0.6], (SIZE // 8) ** 2),
    "half": ("half", 0.5, SIZE),
    "box": ("box", 0.25, SIZE),
    "board": ("checkerboard", 0.5, (SIZE // 8) ** 2),
    "free": ("free-form", 0.4, 1),
}
MASKS = {name: {"pattern": pattern, "ratio": ratio} for name, (pattern, ratio, _) in PATTERNS.items()}


class Restored(NamedTuple):
    """What `HoleScores.ways` gives, in lists, and its source."""

    holes: HoleScores
    found: list[tuple[dict[str, Any], Tensor, Tensor, Tensor]]
    experiment: Experiment

    def of(self, masks: str, by: str) -> tuple[Tensor, Tensor, Tensor]:
        """(masked value, known pixels, filled images)."""
        return next(rest for setting, *rest in self.found if (setting["holes"], setting["by"]) == (masks, by))


def restored(*others: str, seed: int = 0, hidden: float = 0.2, **evaluate: Any) -> Restored:
    """Shapes with a masked image and other modalities; the model has its first weights."""
    settings = {"num_samples": 12, "masking": MASKS, "features": "pixels"} | evaluate
    tree = {
        "name": "tiny",
        "data": {
            "source": "shapes",
            "options": {"rows": 32, "validation_rows": 20, "size": SIZE},
            "masking": {"masked_image": {"pattern": "squares", "ratio": [0.1, 0.75]}},
        },
        "modalities": {name: {"kind": name} for name in ("image", "masked_image", *others)},
        "backbone": {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8},
        "scheduler": {"num_train_timesteps": 50},
        "states": {"anchor_hidden": hidden},
        "train": {"seed": seed},
        "evaluate": settings,
    }
    experiment = build(parse_config(tree))
    pipeline = MTDiffusionPipeline(model=experiment.model.eval(), scheduler=experiment.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    holes = HoleScores(experiment.config, experiment.validation, "image")

    def drawn(count: int, **arguments: Any) -> dict[str, Tensor]:
        return draw(pipeline, count, 8, 0, **{"num_inference_steps": 2} | arguments)

    return Restored(holes, list(holes.fills("masked_image", drawn)), experiment)


@pytest.fixture(scope="module")
def offline() -> Any:
    """LPIPS finds no weights and cannot download any: their folder is a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", __file__)
        yield


@pytest.fixture(scope="module")
def one(offline: None) -> Restored:
    return restored()


def test_known_pixels_are_the_truth_in_every_way(one: Restored) -> None:
    assert [(s["holes"], s["by"]) for s, *_ in one.found] == [
        (masks, by) for masks in PATTERNS for by in ("mean fill", "head", "samples")
    ]
    truth = one.experiment.validation.all(12).values["image"]
    assert torch.equal(one.holes.truth, truth)
    for setting, value, known, images in one.found:
        assert setting["pattern"] == PATTERNS[setting["holes"]][0]
        assert images.shape == truth.shape and known.shape == (12, 1, SIZE, SIZE)
        where = (known == 1).expand_as(truth)
        assert torch.equal(images[where], truth[where])
        assert torch.equal(value, torch.cat([torch.where(where, truth, 0.0), known], dim=1))
        assert not torch.equal(images[~where], truth[~where]) and images.abs().max() <= 1
    head, samples = one.of("half", "head"), one.of("half", "samples")
    assert not torch.equal(head[2], samples[2])


def test_masks_depend_on_nothing_but_law_ratio_and_row(one: Restored) -> None:
    few = {"other name": MASKS["half"], "range": MASKS["range"]}
    other = restored("label", "embedding", seed=5, hidden=0.0, num_samples=20, masking=few)
    assert {setting["by"] for setting, *_ in other.found} == {"mean fill", "samples"}  # its head learned nothing
    for here, there in (("half", "other name"), ("range", "range")):
        known, more = one.of(here, "samples")[1], other.of(there, "samples")[1]
        assert len(more) == 20 and torch.equal(known, more[:12])
        assert torch.equal(known, one.of(here, "mean fill")[1]) and len(set(map(str, known.tolist()))) > 1
    assert not torch.equal(one.of("tenth", "head")[1], one.of("free", "head")[1])


def test_the_hidden_share_is_that_of_the_law(one: Restored) -> None:
    for masks, (_, ratio, unit) in PATTERNS.items():
        _, known, images = one.of(masks, "head")
        share = (1 - known).mean(dim=(1, 2, 3))  # per row
        low, high = ratio if isinstance(ratio, list) else (ratio, ratio)
        slack = 0.5 / SIZE**2  # a share is rounded to pixels
        assert (share >= low - slack).all() and (share < high + slack + unit / SIZE**2).all()
        assert one.holes.scores(images, known)["hidden share"] == pytest.approx(float(share.mean()))
    assert (1 - one.of("range", "head")[1]).mean(dim=(1, 2, 3)).std() > 0.03


def test_the_mean_fill_is_that_of_known_pixels(one: Restored) -> None:
    truth = one.holes.truth.numpy()
    for masks in ("free", "board"):
        _, known, images = one.of(masks, "mean fill")
        for row in range(12):
            seen = known[row, 0].numpy() == 1
            for channel in range(3):
                hole = images[row, channel].numpy()[~seen]
                assert hole == pytest.approx(truth[row, channel][seen].mean(), abs=1e-5)


def test_scores_by_hand(one: Restored) -> None:
    _, known, images = one.of("free", "head")
    scores = one.holes.scores(images, known)
    truth, found = one.holes.truth.double().numpy(), images.double().numpy()
    error = ((found - truth) ** 2).mean(axis=1)  # (n, h, w)
    hole = known[:, 0].numpy() == 0
    in_hole = [10 * math.log10(4 / error[row][hole[row]].mean()) for row in range(12)]
    whole = [10 * math.log10(4 / error[row].mean()) for row in range(12)]
    assert scores["n"] == 12 and "LPIPS, hole" not in scores
    assert scores["PSNR, hole"] == pytest.approx(np.mean(in_hole), rel=1e-5)
    assert scores["PSNR, whole"] == pytest.approx(np.mean(whole), rel=1e-5)
    for name in ("PSNR", "SSIM"):
        assert scores[f"{name}, whole"] > scores[f"{name}, hole"]  # where the rest is the truth
        for part in ("hole", "whole"):
            low, high = scores[f"{name}, {part}, 95 %"]
            assert low <= scores[f"{name}, {part}"] <= high
    perfect = one.holes.scores(one.holes.truth, known)
    assert perfect["SSIM, hole"] == pytest.approx(1) and perfect["PSNR, hole"] == 100


def test_the_modalitys_own_holes_are_the_default(offline: None) -> None:
    found = restored(masking={}, num_samples=3).found
    assert {(s["holes"], s["pattern"], tuple(s["ratio"])) for s, *_ in found} == {
        ("masked_image", "squares", (0.1, 0.75))
    }


def test_bad_sets_of_masks_are_refused_by_name(offline: None) -> None:
    for bad, key in (({"pattern": "star"}, "pattern"), ({"ratio": 1.0}, "ratio"), ({"ratio": [0.5, 0.2]}, "ratio")):
        with pytest.raises(InputError) as caught:
            restored(masking={"fine": {}, "mine": bad})
        assert caught.value.key == f"evaluate.masking.mine.{key}"


# --------------------------------------------------------------------------------------------------------------- LPIPS


def test_without_weights_the_manifest_says_so(one: Restored, tmp_path: Path) -> None:
    assert one.holes.perceptual is None
    assert one.holes.facts["LPIPS"].startswith("not measured: torchvision's weights cannot be had")
    assert {"mask seed": 0, "filled images": 12}.items() <= one.holes.facts.items()


@pytest.mark.parametrize("part", ["backbone", "heads"])
def test_a_local_file_that_does_not_fit_is_refused(offline: None, tmp_path: Path, part: str) -> None:
    wrong = tmp_path / "wrong.pth"
    torch.save({"features.0.weight": torch.zeros(3)}, wrong)
    for file in (wrong, tmp_path / "none.pth"):
        with pytest.raises(InputError) as caught:
            restored(lpips={"net": "squeeze", part: str(file)})
        assert caught.value.key in (f"evaluate.lpips.{part}", "evaluate.lpips.net")
        assert "\n" not in str(caught.value)


@pytest.mark.data
def test_lpips_of_local_weights(offline: None, one: Restored) -> None:
    file = WEIGHTS / "squeezenet1_1_caffe_imagenetnorm.pth"
    with_lpips = restored(masking={"half": MASKS["half"]}, lpips={"net": "squeeze", "backbone": str(file)})
    assert with_lpips.holes.facts["LPIPS"] == "LPIPS-squeeze-caffe"
    by: dict[str, dict[str, Any]] = {}
    score: Callable[..., dict[str, Any]] = with_lpips.holes.scores
    for setting, _, known, images in with_lpips.found:
        by[setting["by"]] = score(images, known)
    for scores in by.values():
        assert scores["LPIPS, hole"] > scores["LPIPS, whole"] > 0
        low, high = scores["LPIPS, hole, 95 %"]
        assert low <= scores["LPIPS, hole"] <= high
    perfect = score(with_lpips.holes.truth, with_lpips.of("half", "head")[1])
    assert perfect["LPIPS, hole"] == perfect["LPIPS, whole"] == 0
