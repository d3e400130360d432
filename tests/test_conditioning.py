"""How observed values steer: guidance against separate forwards, feeds and names with their refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdiff.conditioning import FEEDS, aggregated_names, feed_for, guidance_scales
from mmdiff.errors import InputError
from mmdiff.modalities import Label, Shape
from mmdiff.model import MTDiffusionModel, MTDiffusionModelOutput
from mmdiff.steering import Evaluation, branches, fed_encoding, guided

VALUES = {"label": torch.tensor([2, 0]), "colour": torch.tensor([1, 0])}
EVERYWHERE = torch.ones(2, dtype=torch.bool)
BOTH = {"label": EVERYWHERE, "colour": EVERYWHERE}
SAMPLE, TIMESTEPS = torch.linspace(-2, 2, 2 * 64).reshape(2, 1, 8, 8), torch.tensor([3, 11])


def build() -> MTDiffusionModel:
    """With random numbers where a fresh network has zeros."""
    torch.manual_seed(0)
    model = MTDiffusionModel(
        modality_config={
            "image": {"kind": "image", "channels": 1, "size": 8},
            "label": {"kind": "label", "num_classes": 3},
            "colour": {"kind": "label", "num_classes": 2},
        },
        backbone_config={
            "kind": "unet",
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 8,
        },
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return model.eval()


def forward(model: MTDiffusionModel, observed: Mapping[str, Tensor]) -> MTDiffusionModelOutput:
    observation = model.observation(VALUES, {"label": EVERYWHERE}, observed, like=SAMPLE)
    return model(SAMPLE, TIMESTEPS, observation)


def guide(model: MTDiffusionModel, observed: Mapping[str, Tensor], scales: Mapping[str, float]) -> Evaluation:
    told = branches(model, VALUES, ["label"], observed, tuple(sorted(scales)), like=SAMPLE)
    return guided(model, SAMPLE, TIMESTEPS, told, scales)


@torch.no_grad()
def test_without_scales_it_is_the_plain_forward() -> None:
    model = build()
    actual, expected = guide(model, BOTH, {}), forward(model, BOTH)
    assert torch.equal(actual.prediction, expected.prediction)
    assert all(torch.equal(actual.params[name], expected.params[name]) for name in expected.params)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@torch.no_grad()
def test_one_scale_is_classifier_free_guidance(scale: float) -> None:
    """absent + s (observed − absent) of two separate forwards; the heads are those of the observed one."""
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
    told = branches(model, VALUES, [], BOTH, ("label",), like=SAMPLE)
    guided(model, sample, TIMESTEPS, told, {"label": 2.0}).prediction.sum().backward()
    assert sample.grad is not None and sample.grad.any()


# ----------------------------------------------------------------------------------------------------------- feeds


@pytest.mark.parametrize(
    ("feed", "stochastic", "expected"),
    [
        (None, True, "draw"),
        (None, False, "mean"),
        ("draw", False, "draw"),
        ("mean", True, "mean"),
        ("mode", True, "mode"),
    ],
)
def test_feeds_and_their_defaults(feed: str | None, stochastic: bool, expected: str) -> None:
    assert feed_for(feed, stochastic) == expected


@pytest.mark.parametrize(
    ("feed", "stochastic", "text"),
    [
        ("mode", False, "feed = 'mode': is wrong with a deterministic solver"),
        ("median", True, "feed = 'median': choose one of draw, mean, mode"),
    ],
)
def test_wrong_feeds_are_refused(feed: str, stochastic: bool, text: str) -> None:
    with pytest.raises(InputError) as caught:
        feed_for(feed, stochastic)
    assert text in str(caught.value)


def test_what_is_fed() -> None:
    """The mean is that of the encoding, Σ_k p(k) E(k): with rows of ±1 it is not an encoding of any class."""
    label = Label(Shape((1, 8, 8), 4, 4), num_classes=3)
    params, drawn = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([2])
    rows = label.encode(torch.arange(3))
    expected = {"draw": rows[2:], "mode": rows[:1], "mean": (0.5 * rows[0] + 0.3 * rows[1] + 0.2 * rows[2])[None]}
    assert expected.keys() == set(FEEDS)
    for feed, encoding in expected.items():
        torch.testing.assert_close(fed_encoding(label, params, feed, drawn), encoding)


# ------------------------------------------------------------------------------------------------ names and scales

WEIGHTED = {"label": 1.5, "mask": 0.5, "caption": 0.0}


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        (None, {"label", "mask"}),
        (True, {"label", "mask"}),
        (False, set()),
        ([], set()),
        ("label", {"label"}),
        (["mask"], {"mask"}),
        (("mask", "label"), {"label", "mask"}),
    ],
)
def test_aggregated_names(aggregate: Any, expected: set[str]) -> None:
    assert aggregated_names(aggregate, WEIGHTED) == expected


@pytest.mark.parametrize("aggregate", ["caption", ["label", "caption"], ["nothing"]])
def test_names_without_weight_are_refused(aggregate: Any) -> None:
    with pytest.raises(InputError, match="aggregate = '(caption|nothing)': has no weight; weighted: label, mask"):
        aggregated_names(aggregate, WEIGHTED)


@pytest.mark.parametrize(
    ("guidance_scale", "expected"),
    [
        (1.0, {}),
        (2, {"colour": 2.0, "label": 2.0}),
        ({"label": 3.0}, {"label": 3.0}),
        ({"label": 1.0, "colour": 0.0}, {"colour": 0.0}),
        ({}, {}),
    ],
)
def test_guidance_scales(guidance_scale: Any, expected: dict[str, float]) -> None:
    assert guidance_scales(guidance_scale, {"label", "colour"}) == expected


def test_a_scale_for_what_is_not_observed_is_refused() -> None:
    with pytest.raises(InputError, match="guidance_scale.mask = 2.0: this modality is not observed"):
        guidance_scales({"mask": 2.0, "label": 1.0}, {"label"})
