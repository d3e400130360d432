"""How observed values steer: guidance against separate forwards, feeds and names with their refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from networks import random_model
from refusals import refused
from torch import Tensor

from mmdiff.modalities import Label, Shape
from mmdiff.model import MTDiffusionModel, MTDiffusionModelOutput
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.sampling.conditioning import (
    FEEDBACKS,
    Conditioning,
    aggregated_names,
    conditioning_of,
    feedback_for,
    guidance_scales,
)
from mmdiff.sampling.guidance import Denoiser, Evaluation, branches_of, feedback_encoding, guided
from mmdiff.sampling.heads import heads_of_noised_anchor
from mmdiff.sampling.request import read_levels
from mmdiff.schedulers import MTDiffusionScheduler

VALUES = {"label": torch.tensor([2, 0]), "colour": torch.tensor([1, 0])}
EVERYWHERE = torch.ones(2, dtype=torch.bool)
BOTH = {"label": EVERYWHERE, "colour": EVERYWHERE}
SAMPLE, TIMESTEPS = torch.linspace(-2, 2, 2 * 64).reshape(2, 1, 8, 8), torch.tensor([3, 11])


def build(observable: list[str] | None = None) -> MTDiffusionModel:
    modalities = {
        "image": {"kind": "image", "channels": 1, "size": 8},
        "label": {"kind": "label", "num_classes": 3},
        "colour": {"kind": "label", "num_classes": 2},
    }
    return random_model(modalities, std=0.3, observable=observable)


def forward(model: MTDiffusionModel, observed: Mapping[str, Tensor]) -> MTDiffusionModelOutput:
    observation = model.observation(VALUES, {"label": EVERYWHERE}, observed, like=SAMPLE)
    return model(SAMPLE, TIMESTEPS, observation)


def guide(model: MTDiffusionModel, observed: Mapping[str, Tensor], scales: Mapping[str, float]) -> Evaluation:
    branches = branches_of(model, VALUES, ["label"], observed, tuple(sorted(scales)), like=SAMPLE)
    return guided(model, SAMPLE, TIMESTEPS, branches, scales)


@torch.no_grad()
def test_without_scales_it_is_the_plain_forward() -> None:
    model = build()
    actual, expected = guide(model, BOTH, {}), forward(model, BOTH)
    assert torch.equal(actual.prediction, expected.prediction)
    assert all(torch.equal(actual.params[name], expected.params[name]) for name in expected.params)


@torch.no_grad()
def test_one_scale_is_classifier_free_guidance() -> None:
    """absent + s (observed − absent) of two separate forwards; the heads are those of the observed one."""
    for scale in [0.0, 1.0, 2.5]:
        model, observed = build(), {"colour": EVERYWHERE}
        full, absent = forward(model, observed), forward(model, {})
        assert (full.prediction - absent.prediction).abs().max() > 1e-2  # the observation matters
        actual = guide(model, observed, {"colour": scale})
        expected = absent.prediction + scale * (full.prediction - absent.prediction)
        torch.testing.assert_close(actual.prediction, expected, rtol=1e-4, atol=1e-5)
        for name, params in full.params.items():
            torch.testing.assert_close(actual.params[name], params, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_modality_has_its_own_scale() -> None:
    model = build()
    full = forward(model, BOTH).prediction
    without_label, without_colour = (forward(model, {name: EVERYWHERE}).prediction for name in ("colour", "label"))
    expected = full + 2.0 * (full - without_label) - 0.5 * (full - without_colour)
    actual = guide(model, BOTH, {"label": 3.0, "colour": 0.5}).prediction
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guide(model, BOTH, {"colour": 0.5, "label": 3.0}).prediction, actual)


def test_gradients_flow_through_guidance() -> None:
    model, sample = build(), SAMPLE.clone().requires_grad_()
    branches = branches_of(model, VALUES, [], BOTH, ("label",), like=SAMPLE)
    guided(model, sample, TIMESTEPS, branches, {"label": 2.0}).prediction.sum().backward()
    assert sample.grad is not None and sample.grad.any()


# ----------------------------------------------------------------------------------------------------------- feeds


FEEDBACK_OF = [
    (None, True, "draw"),
    (None, False, "mean"),
    ("draw", False, "draw"),
    ("mean", True, "mean"),
    ("mode", True, "mode"),
]


def test_feeds_and_their_defaults() -> None:
    for feedback, stochastic, expected in FEEDBACK_OF:
        assert feedback_for(feedback, stochastic) == expected


def test_wrong_feeds_are_refused() -> None:
    for feedback, stochastic in [("mode", False), ("median", True)]:
        with refused("feedback", feedback):
            feedback_for(feedback, stochastic)


def test_what_is_fed() -> None:
    """The mean is that of the encoding, Σ_k p(k) E(k): with rows of ±1 it is not an encoding of any class."""
    label = Label(Shape((1, 8, 8), 4, 4), num_classes=3)
    params, drawn = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([2])
    rows = label.encode(torch.arange(3))
    expected = {"draw": rows[2:], "mode": rows[:1], "mean": (0.5 * rows[0] + 0.3 * rows[1] + 0.2 * rows[2])[None]}
    assert expected.keys() == set(FEEDBACKS)
    for feedback, encoding in expected.items():
        torch.testing.assert_close(feedback_encoding(label, label.encode, params, feedback, drawn), encoding)


# ------------------------------------------------------------------------------------------------ names and scales

WEIGHTED = {"label": 1.5, "mask": 0.5, "caption": 0.0}


AGGREGATED = [
    (None, {"label", "mask"}),
    (True, {"label", "mask"}),
    (False, set()),
    ([], set()),
    ("label", {"label"}),
    (["mask"], {"mask"}),
    (("mask", "label"), {"label", "mask"}),
]


def test_aggregated_names() -> None:
    for aggregate, expected in AGGREGATED:
        assert aggregated_names(aggregate, WEIGHTED) == expected


def test_names_without_weight_are_refused() -> None:
    for aggregate in ["caption", ["label", "caption"], ["nothing"]]:
        with refused("aggregate"):
            aggregated_names(aggregate, WEIGHTED)


SCALES = [
    (1.0, {}),
    (2, {"colour": 2.0, "label": 2.0}),
    ({"label": 3.0}, {"label": 3.0}),
    ({"label": 1.0, "colour": 0.0}, {"colour": 0.0}),
    ({}, {}),
]


def test_guidance_scales() -> None:
    for guidance_scale, expected in SCALES:
        assert guidance_scales(guidance_scale, {"label", "colour"}) == expected


def test_a_scale_for_what_is_not_observed_is_refused() -> None:
    with refused("guidance_scale.mask", 2.0):
        guidance_scales({"mask": 2.0, "label": 1.0}, {"label"})


# ---------------------------------------------------------------------------------------------- methods, by modality


def plan(conditioning: Any = None, aggregated: Any = ("label",), **arguments: Any) -> Conditioning:
    return conditioning_of(build(), VALUES, conditioning, set(aggregated), **arguments)


def test_by_default_values_act_as_trained() -> None:
    found = plan()
    assert (found.concatenated, found.aggregated, found.fed_back) == ({"label", "colour"}, {"label"}, set())
    assert (found.head_guidance, found.replaced, found.left_out) == ({}, set(), ())
    unseen = conditioning_of(build(observable=["image"]), VALUES, None, {"label"})
    assert (unseen.concatenated, unseen.aggregated, unseen.head_guidance) == (set(), {"label"}, {"colour": 1.0})
    unknown = conditioning_of(build(), {}, None, {"label"})
    assert unknown.fed_back == unknown.in_mean == {"label"}


WAYS = [
    ("concatenation", {"label", "colour"}, set(), set()),
    (["concatenation", "aggregation"], {"label", "colour"}, {"label"}, set()),
    ({"head-guidance"}, set(), set(), {"label", "colour"}),
    (("head-guidance", "aggregation"), set(), {"label"}, {"label", "colour"}),
    ({"label": "aggregation"}, {"colour"}, {"label"}, set()),
    (
        {"label": ["head-guidance"], "colour": ["concatenation", "head-guidance"]},
        {"colour"},
        set(),
        {"label", "colour"},
    ),
]


def test_ways_for_all_and_by_name() -> None:
    for conditioning, channels, plugged, guides in WAYS:
        found = plan(conditioning)
        assert (found.concatenated, found.aggregated, set(found.head_guidance)) == (channels, plugged, guides)
        assert set(found.left_out) == guides & channels


IMPOSSIBLE = [
    (
        {"conditioning": "magic"},
        "conditioning",
        "magic",
    ),
    ({"conditioning": []}, "conditioning", []),
    ({"conditioning": {"label": []}}, "conditioning.label", []),
    (
        {"conditioning": {"mask": "concatenation"}},
        "conditioning.mask",
        "concatenation",
    ),
    ({"conditioning": "replacement"}, "conditioning", "replacement"),
    (
        {"conditioning": ["concatenation", "replacement"]},
        "conditioning",
        "replacement",
    ),
    (
        {"conditioning": "aggregation"},
        "conditioning",
        "aggregation",
    ),
    (
        {"conditioning": {"colour": "aggregation"}},
        "conditioning.colour",
        "aggregation",
    ),
    (
        {"conditioning": {"label": "aggregation"}, "aggregated": ()},
        "conditioning.label",
        "aggregation",
    ),
    (
        {"conditioning": {"label": ["concatenation", "replacement"]}},
        "conditioning.label",
        "replacement",
    ),
    ({"conditioning": "head-guidance", "denoising": False}, "conditioning", "head-guidance"),
    (
        {"conditioning": "head-guidance", "guidance_scale": 2.0},
        "guidance_scale",
        2.0,
    ),
    (
        {"conditioning": {"label": "aggregation"}, "guidance_scale": {"label": 2.0}},
        "guidance_scale.label",
        2.0,
    ),
    ({"head_guidance_scale": {"label": 2.0}}, "head_guidance_scale.label", 2.0),
    ({"resampling": 3}, "resampling", 3),
    ({"resampling": (0, 1)}, "resampling", (0, 1)),
    ({"resampling": (1, 2, 3)}, "resampling", (1, 2, 3)),
]


def test_what_cannot_be_is_refused_in_one_line() -> None:
    for arguments, key, value in IMPOSSIBLE:
        with refused(key, value):
            plan(**arguments)


def test_head_guidance_beside_channels_reads_the_branch_that_does_not_see_the_value() -> None:
    """The gradient of log p(colour | z_t, label), its head where colour is not observed, in total nats."""
    model, scheduler = build(), MTDiffusionScheduler(num_train_timesteps=20)
    chosen = conditioning_of(model, VALUES, {"colour": ["concatenation", "head-guidance"]}, {"label"})
    encodings = model.encode({"label": VALUES["label"]})
    times = torch.tensor([4, 4])
    found = Denoiser(model, scheduler, VALUES, chosen, encodings, len(SAMPLE))(SAMPLE, times, 4)

    z = SAMPLE.clone().requires_grad_()
    logits = model(z, times, model.observation(VALUES, {"label": EVERYWHERE}, {"label": EVERYWHERE}, like=z)).params
    logits["colour"].log_softmax(1)[[0, 1], VALUES["colour"]].sum().backward()
    full = model(SAMPLE, times, model.observation(VALUES, {"label": EVERYWHERE}, BOTH, like=SAMPLE)).prediction
    a_bar = scheduler.alphas_cumprod[4]
    expected = full - ((1 - a_bar).sqrt() / a_bar.sqrt()).float() * z.grad  # v
    assert z.grad.any()
    torch.testing.assert_close(found.prediction, expected.detach(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- reading at noise levels


@torch.no_grad()
def test_read_timesteps_average_the_heads_laws() -> None:
    model, scheduler = build(), MTDiffusionScheduler(num_train_timesteps=20)
    pipe = MTDiffusionPipeline(model=model, scheduler=scheduler)
    generator, image, levels = torch.Generator().manual_seed(0), SAMPLE / 2, (0, 5, 9)
    probabilities = []
    for level in levels:
        noise, times = torch.randn(2, 1, 8, 8, generator=generator), torch.full((2,), level)
        a_bar = scheduler.alphas_cumprod[level]
        z_t = (a_bar.sqrt() * image + (1 - a_bar).sqrt() * noise).float()
        shown = model.observation(VALUES, {}, {"colour": EVERYWHERE}, like=z_t)
        probabilities.append(model(z_t, times, shown).params["label"].softmax(1))
    expected = torch.stack(probabilities).mean(0)
    noises = iter([torch.randn(2, 1, 8, 8, generator=g) for g in [torch.Generator().manual_seed(0)] for _ in levels])
    values = {"image": image, "colour": VALUES["colour"]}
    params = heads_of_noised_anchor(model, scheduler, values, ["colour"], levels, noises)
    torch.testing.assert_close(params["label"].softmax(1), expected, rtol=1e-4, atol=1e-5)
    read = pipe(observed=values, read_timesteps=levels, generator=torch.Generator().manual_seed(0), output_type="pt")
    assert torch.equal(read.samples["label"], expected.argmax(1))


def test_an_anchor_that_training_never_showed_is_read_unnoised() -> None:
    assert read_levels(None, build(), 20) is None
    assert read_levels(None, build(observable=["label"]), 20) == (0,)
    for bad in ((), (20,), (-1, 3), (0.5,)):
        with refused("read_timesteps"):
            read_levels(bad, build(), 20)
