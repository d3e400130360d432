"""Ways to fill holes: baselines by hand, evaluations counted, RePaint's conversion and pattern on an exact Gaussian."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import KNOWN, RHO, SCALE, ExactGaussian, alive
from torch import Generator, Tensor

from mmdiff.benchmarks.reconstruction.methods import (
    METHODS,
    Options,
    Trained,
    blur,
    draws,
    head,
    predicted_noise,
    repaint,
    repaint_solver,
    sdedit,
)
from mmdiff.config import Config, parse_config
from mmdiff.data.masking import known_masks
from mmdiff.evaluation.holes import pasted, per_image
from mmdiff.model import MTDiffusionModel
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.resolve import resolve
from mmdiff.sampling.replacement import visits
from mmdiff.schedulers import MTDiffusionScheduler

BASELINES = [name for name, method in METHODS.items() if method.able is None]
SIZE = 8
IMAGE = {"kind": "image", "channels": 3, "size": SIZE}
MASKED = {"kind": "masked_image", "channels": 3, "size": SIZE}
BACKBONE = {"kind": "unet", "block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
BACKBONE |= {"attention_head_dim": 4}


def images(count: int = 4, channels: int = 3) -> tuple[Tensor, Tensor]:
    """8-bit noise (n, C, 8, 8) in [−1, 1], and holes of every pattern."""
    pixels = torch.randint(256, (count, channels, SIZE, SIZE), generator=Generator().manual_seed(0)) / 127.5 - 1
    return pixels, known_masks("mixed", (0.2, 0.6), SIZE, SIZE, 0, torch.arange(count))


def run(masked: bool = True, observed: float = 0.7, hidden: float = 0.2, loss_weight: float = 0.1) -> Trained:
    """Random weights, as if trained with these states."""
    modalities = {"image": IMAGE} | ({"masked_image": MASKED} if masked else {})
    tree: dict[str, Any] = {"name": "tiny", "data": {"source": "shapes"}, "modalities": dict(modalities)}
    if masked:
        own = {"states": {"observed": observed}, "loss_weight": loss_weight}
        tree["modalities"]["masked_image"] = MASKED | own
    tree["states"] = {"anchor_hidden": hidden, "anchor_observed": 0.0}
    config: Config = resolve(parse_config(tree), None)
    torch.manual_seed(0)
    model = alive(MTDiffusionModel(modality_config=modalities, backbone_config=BACKBONE))
    scheduler = MTDiffusionScheduler(solver="DPMSolverMultistepScheduler", prediction_type="sample")
    pipeline = MTDiffusionPipeline(model=model, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return Trained("tiny", config, pipeline, Path("nowhere"))


def generators(count: int, seed: int = 0) -> list[Generator]:
    return [Generator().manual_seed(100 * seed + row) for row in range(count)]


# ---------------------------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("channels", [1, 3])
def test_floors_know_nothing_of_the_hole_and_leave_the_rest(name: str, channels: int) -> None:
    truth, known = images(channels=channels)
    filled = METHODS[name].fill(None, truth * known, known, [])
    assert filled.shape == truth.shape and filled.abs().max() <= 1 + 1e-6
    other = torch.where(known > 0, truth, -truth.roll(1, 0))  # another truth in the hole
    assert torch.equal(METHODS[name].fill(None, other, known, []), filled)
    restored = pasted(filled, truth, known)
    assert torch.equal(restored * known, truth * known)
    assert torch.equal(restored * (1 - known), filled * (1 - known))


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "masked"])
def test_floors_continue_a_flat_image(name: str) -> None:
    _, known = images()
    flat = torch.full((4, 3, SIZE, SIZE), 0.2)
    filled = METHODS[name].fill(None, flat * known, known, [])
    assert (filled - 0.2).abs().max() < 2.01 / 127.5  # in 8 bits
    assert (METHODS["masked"].fill(None, flat, known, []) == flat * known).all()


def test_blur_is_a_weighted_mean_of_known_pixels() -> None:
    truth, known = images(2)
    found = blur(None, truth * known, known, width=1 / 8)
    for y, x in itertools.product((0, 3, 7), (1, 6)):
        total, weights = torch.zeros(2, 3), torch.zeros(2, 1)
        for i, j in itertools.product(range(SIZE), range(SIZE)):
            weight = math.exp(-((y - i) ** 2 + (x - j) ** 2) / 2) * known[:, :, i, j]  # σ = 1 pixel
            total, weights = total + weight * truth[:, :, i, j], weights + weight
        torch.testing.assert_close(found[:, :, y, x], total / weights, rtol=1e-4, atol=1e-5)


def test_blur_reaches_far() -> None:
    """A hole over nearly everything: weights underflow nowhere."""
    known = torch.zeros(1, 1, 32, 32)
    known[..., 0] = 1
    found = blur(None, torch.full((1, 3, 32, 32), 0.5) * known, known, width=1 / 32)
    assert torch.allclose(found, torch.tensor(0.5))


def test_scores_do_not_see_what_a_method_did_to_known_pixels() -> None:
    truth, known = images()
    fill = torch.rand(truth.shape, generator=Generator().manual_seed(1)) * 2 - 1
    other = torch.where(known > 0, -truth, fill)
    one, two = (per_image(pasted(x, truth, known), truth, known, None) for x in (fill, other))
    assert one and all(torch.equal(one[name], two[name]) for name in one)
    raw = per_image(other, truth, known, None)
    assert (raw["PSNR, whole"] < one["PSNR, whole"]).all()
    assert torch.allclose(raw["PSNR, hole"], one["PSNR, hole"])


# -------------------------------------------------------------------------------------------------------------- methods

ABLE = [
    ({}, {"head", "concatenation", "replacement", "concatenation+replacement"}),  # (a)
    ({"hidden": 1.0, "observed": 1.0}, {"head"}),  # (b)
    ({"masked": False, "hidden": 0.0}, {"repaint", "sdedit"}),  # (c), (d)
    ({"observed": 1.0, "hidden": 0.0, "loss_weight": 0.0}, {"concatenation", "concatenation+replacement"}),  # (e)
    ({"observed": 0.0, "hidden": 0.0}, {"replacement"}),
]


@pytest.mark.parametrize(("settings", "expected"), ABLE, ids=[str(s) for s, _ in ABLE])
def test_a_run_can_do_what_it_was_trained_for(settings: dict[str, Any], expected: set[str]) -> None:
    trained = run(**settings)
    assert {name for name, method in METHODS.items() if method.able and method.able(trained)} == expected


def test_rows_follow_the_options() -> None:
    options = Options(steps=(2, 3), guidance=(1.0, 2.0), repaint=((1, 1, 4), (2, 2, 6)), sdedit=(3,))
    rows = METHODS["concatenation"].settings(run(), options)
    assert [(row["steps"], row.get("guidance", 1)) for row in rows] == [(2, 1), (2, 2.0), (3, 1), (3, 2.0)]
    assert len(METHODS["replacement"].settings(run(), options)) == 2  # guidance belongs to channels
    assert len(METHODS["concatenation"].settings(run(observed=1.0), options)) == 2  # never trained without
    assert METHODS["repaint"].settings(None, options) == [{"jumps": [1, 1, 4]}, {"jumps": [2, 2, 6]}]


COUNTS = [
    (head, {}, True, 1),
    (draws, {"conditioning": "concatenation", "steps": 4}, True, 4),
    (draws, {"conditioning": "concatenation", "steps": 3, "guidance": 2.0}, True, 6),
    (draws, {"conditioning": "replacement", "steps": 4}, True, 4),
    (draws, {"conditioning": "concatenation+replacement", "steps": 4}, True, 4),
    (repaint, {"jumps": [2, 3, 6], "eta": 0.0}, False, 14),
    (repaint, {"jumps": [1, 1, 6], "eta": 1.0}, False, 6),
    (sdedit, {"steps": 7, "strength": 0.6, "eta": 1.0}, False, 7),
    (sdedit, {"steps": 6, "strength": 0.01, "eta": 0.0}, False, 6),
]


@pytest.mark.parametrize(("fill", "setting", "masked", "evaluations"), COUNTS)
def test_evaluations_and_draws(fill: Any, setting: dict[str, Any], masked: bool, evaluations: int) -> None:
    """What costs is counted; a fill is a function of its own generator, not of the batch, nor of the hole's truth."""
    trained = run(masked, hidden=0.2 if masked else 0.0)
    truth, known = images(3)
    with trained.counting() as batches:
        found = fill(trained, truth * known, known, generators(3), **setting)
    assert sum(batches) == 3 * evaluations
    alone = fill(trained, (truth * known)[2:3], known[2:3], generators(3)[2:3], **setting)
    assert torch.allclose(alone, found[2:3], atol=1e-4)
    assert torch.equal(fill(trained, truth, known, generators(3), **setting), found)
    again = fill(trained, truth * known, known, generators(3, seed=1), **setting)
    assert torch.equal(again, found) == (fill is head)


def test_the_published_schedules() -> None:
    """RePaint's own choice costs 2 410 evaluations; the cheaper ones 50 and 250."""
    solver = repaint_solver(run(masked=False, hidden=0.0), 0.0)
    for jumps, expected in (((5, 3, 20), 50), ((10, 6, 50), 250), ((10, 10, 250), 2410)):
        solver.set_timesteps(jumps[2], jumps[0], jumps[1])
        states = [int(solver.timesteps[0]) + 1, *solver.timesteps.tolist()]
        assert sum(after < before for before, after in itertools.pairwise(states)) == expected
        assert len(visits(jumps[2], jumps[0], jumps[1])) == expected


# ----------------------------------------------------------------------------------------- an exact Gaussian, float64


def exact(prediction_type: str) -> Trained:
    image = {"kind": "image", "channels": 1, "size": [1, 2]}
    model = MTDiffusionModel(modality_config={"image": image}, backbone_config=BACKBONE).double()
    scheduler = MTDiffusionScheduler(clip_sample=False, prediction_type=prediction_type)
    model.backbone = ExactGaussian(scheduler)
    config = parse_config({"name": "exact", "data": {"source": "shapes"}, "modalities": {"image": image}})
    return Trained("exact", config, MTDiffusionPipeline(model=model.eval(), scheduler=scheduler), Path("nowhere"))


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("timestep", [0, 300, 900])
def test_any_prediction_becomes_the_noise(prediction_type: str, timestep: int) -> None:
    trained = exact(prediction_type)
    z_t = torch.randn(5, 1, 1, 2, generator=Generator().manual_seed(0), dtype=torch.float64)
    expected = trained.pipeline.model.backbone.noise(z_t, timestep)
    torch.testing.assert_close(predicted_noise(trained.pipeline, z_t, timestep), expected, rtol=1e-7, atol=1e-9)


def test_repaint_comes_to_the_conditional_law() -> None:
    """N(ρ x, s² (1 − ρ²)), as far as resampling brings it; the known pixel comes back as it is."""
    count, mean = 600, RHO * KNOWN
    trained, errors = exact("sample"), []
    known = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(count, 1, 1, 2)
    for jumps in ((1, 1, 30), (4, 8, 30)):
        found = repaint(trained, known * KNOWN, known, Generator().manual_seed(0), jumps, eta=1.0)
        assert torch.allclose(found[..., 0], torch.tensor(KNOWN, dtype=torch.float64))
        errors.append(abs(float(found[..., 1].mean()) - mean))
    assert errors[0] > 0.1 and errors[1] < 0.08 and errors[0] > 3 * errors[1]
    assert float(found[..., 1].std()) == pytest.approx(SCALE * (1 - RHO**2) ** 0.5, abs=0.07)


def test_sdedit_keeps_its_guide_where_it_is_weak() -> None:
    """A little noise leaves the guide, the blurred known pixel; all of it leaves the data's pattern."""
    trained, count = exact("sample"), 400
    known = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(count, 1, 1, 2)
    weak, strong = (
        sdedit(trained, known * KNOWN, known, Generator().manual_seed(0), 20, strength, 0.0)[..., 1]
        for strength in (0.04, 1.0)
    )
    assert abs(float(weak.mean()) - KNOWN) < 0.03 and float(weak.std()) < 0.1 < float(strong.std())
