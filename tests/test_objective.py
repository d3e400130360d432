"""One training step: it is DDPM's where nothing is aggregated, and the same however a global batch is split."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from networks import DIT, random_model
from torch import Tensor

from mmdiff.data import Batch
from mmdiff.model import MTDiffusionModel
from mmdiff.objective import BatchPosition, MTObjective, ObjectiveOutput, StateProbabilities
from mmdiff.randomness import normal
from mmdiff.schedulers import MTDiffusionScheduler

T, CLASSES = 20, 3
ABSENT, AGGREGATED, OBSERVED = StateProbabilities(0.0, 0.0), StateProbabilities(1.0, 0.0), StateProbabilities(0.0, 1.0)
MIXED = StateProbabilities(0.5, 0.3)
BUMP = {"schedule": "bump", "scale": 0.5}


def build(
    label: StateProbabilities = ABSENT,
    image: StateProbabilities = ABSENT,
    weight: dict[str, Any] = BUMP,
    prediction_type: str = "v_prediction",
    label_weight: float = 0.1,
    masked: StateProbabilities | None = None,
    **settings: Any,
) -> MTObjective:
    """With a masked image where its distribution is given."""
    model = random_model(
        {
            "image": {"kind": "image", "channels": 1, "size": 8},
            "label": {"kind": "label", "num_classes": CLASSES},
            **({"masked": {"kind": "masked_image", "channels": 1, "size": 8}} if masked else {}),
        },
    )
    scheduler = MTDiffusionScheduler(num_train_timesteps=T, prediction_type=prediction_type, weights={"label": weight})
    probabilities = {"image": image, "label": label} | ({"masked": masked} if masked else {})
    weights = {"label": label_weight} | ({"masked": 0.1} if masked else {})
    return MTObjective(model, scheduler, probabilities, weights, **settings)


def batch(count: int = 8, missing: dict[str, list[int]] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    values = {"image": torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1, "label": torch.arange(count) % CLASSES}
    present = {name: torch.ones(count, dtype=torch.bool) for name in values}
    for name, rows in (missing or {}).items():
        present[name][rows] = False
    return Batch(values, present)


def with_holes(whole: Batch) -> Batch:
    """The batch, and its images with every second column hidden."""
    image = whole.values["image"]
    known = (torch.arange(8) % 2 == 0).float().expand(len(image), 1, 8, 8)
    values = {**whole.values, "masked": torch.cat([image * known, known], dim=1)}
    return Batch(values, {**whole.present, "masked": whole.present["image"]})


def where(count: int = 8, step: int = 5) -> BatchPosition:
    return BatchPosition(step, torch.arange(count), count)


def rows(whole: Batch, at: BatchPosition, chosen: Tensor) -> tuple[Batch, BatchPosition]:
    values, present = ({name: x[chosen] for name, x in part.items()} for part in whole[:2])
    return Batch(values, present), at._replace(positions=at.positions[chosen])


def gradients(
    objective: MTObjective, *parts: tuple[Batch, BatchPosition]
) -> tuple[list[ObjectiveOutput], dict[str, Tensor]]:
    """Outputs of the parts and the gradient of the mean of their losses."""
    objective.zero_grad()
    outputs = [objective(*part) for part in parts]
    (sum(output.loss for output in outputs) / len(outputs)).backward()
    return outputs, {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------ reduces to DDPM


def test_with_everything_absent_it_is_the_loss_of_ddpm() -> None:
    for prediction_type, step in itertools.product(["v_prediction", "epsilon", "sample"], [0, 7]):
        objective = build(weight={"schedule": "none"}, prediction_type=prediction_type)
        rows_, at = batch(40), where(40, step)  # two for every timestep, 0 included
        timesteps = objective.draw_timesteps(at, torch.ones(40, dtype=torch.bool))
        noise = normal(0, step, "noise", at.positions, (1, 8, 8))
        ddpm = DDPMScheduler(T, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)
        z_0 = rows_.values["image"]
        z_t = ddpm.add_noise(z_0, noise, timesteps)
        targets = {"v_prediction": ddpm.get_velocity(z_0, noise, timesteps), "epsilon": noise, "sample": z_0}
        unobserved = torch.zeros(40, 2, 8, 8)  # the observation channels of image and label
        prediction = objective.model.backbone.unet(torch.cat([z_t, unobserved], dim=1), timesteps).sample
        terms = objective(rows_, at).terms
        expected = torch.nn.functional.mse_loss(prediction, targets[prediction_type])
        torch.testing.assert_close(terms["l1"] + terms["l3"], expected)
        assert float(terms["l3"]) > 0  # t = 1 is among the timesteps


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    large = {"schedule": "constant", "scale": 6.0}  # W_T = 0.09
    output = build(AGGREGATED, weight=large, terminal_weight=3.0, label_weight=0.25)(batch(), where())
    terms = output.terms
    assert terms.keys() == {"loss", "l0", "l1", "l3", "l2/label"}
    assert not any(term.requires_grad for term in terms.values())
    assert float(terms["l0"]) > 1e-3  # about W_T² / 2: large enough for the comparison with L1 of about 1 to see it
    expected = 3.0 * terms["l0"].float() + terms["l1"] + terms["l3"] + 0.25 * terms["l2/label"]
    torch.testing.assert_close(output.loss.detach(), expected)


def test_l0_is_the_closed_form() -> None:
    """½ (ā_T z_0² + (1 − ā_T) − 1 − log(1 − ā_T)) per dimension, where W_T = 0 up to √ā_T (bump)."""
    objective = build(weight={"schedule": "none"})
    a_bar = float(objective.scheduler.alphas_cumprod[-1])
    expected = 0.5 * (a_bar * float(batch().values["image"].square().mean()) - a_bar - math.log1p(-a_bar))
    assert float(objective(batch(), where()).terms["l0"]) == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------- any split of the batch is the same


def test_parts_of_a_batch_average_to_the_whole() -> None:
    for parts, weight, distribution in itertools.product(
        [2, 4], [BUMP, {"schedule": "learned", "scale": 1.0}], ["independent", "each_alone"]
    ):
        objective = build(MIXED, StateProbabilities(0.0, 0.25), weight, min_snr_gamma=5.0, distribution=distribution)
        whole, at = batch(missing={"label": [1, 6]}), where()
        outputs, expected = gradients(objective, (whole, at))
        pieces = [rows(whole, at, chosen) for chosen in torch.arange(8).chunk(parts)]
        split, actual = gradients(objective, *pieces)
        for name, term in outputs[0].terms.items():
            torch.testing.assert_close(sum(output.terms[name] for output in split) / parts, term, rtol=1e-5, atol=1e-7)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_the_order_of_rows_does_not_matter() -> None:
    objective, whole, at = build(MIXED, StateProbabilities(0.0, 0.25)), batch(), where()
    shuffled = rows(whole, at, torch.tensor([3, 0, 7, 5, 1, 2, 6, 4]))
    for name, term in objective(whole, at).terms.items():
        torch.testing.assert_close(objective(*shuffled).terms[name], term, rtol=1e-5, atol=1e-7)


def test_repetition_is_exact_and_steps_differ() -> None:
    objective = build(MIXED)
    one, again, other = (objective(batch(), where(step=step)).loss for step in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# ------------------------------------------------------------------------------------------ states and missing values


def test_states_follow_their_law_and_all_occur() -> None:
    objective, count = build(MIXED), 4000
    aggregated, observed, denoised = objective.draw_states(batch(count), where(count))
    a, o = aggregated["label"], observed["label"]
    shares = torch.stack([~a & ~o, a & ~o, ~a & o, a & o]).double().mean(dim=1)
    expected = torch.tensor([0.5 * 0.7, 0.5 * 0.7, 0.5 * 0.3, 0.5 * 0.3], dtype=torch.float64)  # independent flags
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()
    assert not aggregated["image"].any() and not observed["image"].any()
    assert denoised.all()


def test_certain_states_are_certain() -> None:
    for distribution, expected in [
        (ABSENT, (0, 0)),
        (AGGREGATED, (1, 0)),
        (OBSERVED, (0, 1)),
        (StateProbabilities(1, 1), (1, 1)),
    ]:
        aggregated, observed, denoised = build(distribution).draw_states(batch(100), where(100))
        assert (aggregated["label"] == bool(expected[0])).all()
        assert (observed["label"] == bool(expected[1])).all()
        assert denoised.all()


def test_a_missing_value_has_no_effect() -> None:
    for label, image, name in itertools.product(
        [ABSENT, StateProbabilities(1.0, 1.0), MIXED], [ABSENT, OBSERVED], ["label", "image"]
    ):
        objective = build(label, image)
        whole = batch(missing={name: [2, 5]})
        before = objective(whole, where()).terms
        other = {"label": (whole.values["label"] + 1) % CLASSES, "image": -whole.values["image"]}[name]
        whole.values[name][[2, 5]] = other[[2, 5]]
        after = objective(whole, where()).terms
        assert all(torch.equal(before[term], after[term]) for term in before)


def test_a_missing_label_drops_its_term_and_its_encoding() -> None:
    """L2 is divided by the full batch: rows present in both batches contribute the same."""
    objective, at = build(AGGREGATED), where()
    full, without = batch(), batch(missing={"label": [2, 5]})
    aggregated, _, _ = objective.draw_states(without, at)
    assert aggregated["label"].tolist() == [k not in (2, 5) for k in range(8)]
    ones = [objective(*rows(full, at, torch.tensor([k]))).terms["l2/label"] for k in range(8)]
    expected = sum(term for k, term in enumerate(ones) if k not in (2, 5)) / 8
    torch.testing.assert_close(objective(without, at).terms["l2/label"], expected, rtol=1e-5, atol=1e-7)


def test_an_observed_label_costs_nothing_and_is_seen() -> None:
    objective = build(OBSERVED)
    one, other = batch(), batch()
    other.values["label"] = (other.values["label"] + 1) % CLASSES
    before, after = objective(one, where()).terms, objective(other, where()).terms
    assert float(before["l2/label"]) == 0
    assert before["l1"] != after["l1"]


def test_an_observed_anchor_costs_nothing_and_is_read_at_the_last_timestep() -> None:
    objective, whole, at = build(AGGREGATED, OBSERVED), batch(), where()
    aggregated, _, denoised = objective.draw_states(whole, at)
    assert not aggregated["label"].any()  # z_t carries nothing
    assert not denoised.any()
    assert objective.draw_timesteps(at, denoised).tolist() == [T - 1] * 8
    terms = objective(whole, at).terms
    assert float(terms["l1"]) == float(terms["l3"]) == 0
    z = torch.zeros(8, 1, 8, 8)
    everywhere = torch.ones(8, dtype=torch.bool)
    seen = objective.model.observation(whole.values, {}, {"image": everywhere}, like=z)
    logits = objective.model(z, torch.full((8,), T - 1), seen).params["label"]
    torch.testing.assert_close(terms["l2/label"], torch.nn.functional.cross_entropy(logits, whole.values["label"]))


# --------------------------------------------------------------------------- hidden anchors, and heads that predict it


def test_where_the_anchor_is_hidden_the_heads_read_from_what_else_is_observed() -> None:
    """In one evaluation at t = T of z_T's mean 0, as sampling does without denoising."""
    objective, whole, at = build(AGGREGATED, masked=OBSERVED, anchor_hidden=1.0), with_holes(batch()), where()
    aggregated, observed, denoised = objective.draw_states(whole, at)
    assert not denoised.any() and not observed["image"].any() and not aggregated["label"].any()
    assert objective.draw_timesteps(at, denoised).tolist() == [T - 1] * 8
    terms = objective(whole, at).terms
    assert float(terms["l1"]) == float(terms["l3"]) == 0
    z, everywhere = torch.zeros(8, 1, 8, 8), torch.ones(8, dtype=torch.bool)
    seen = objective.model.observation(whole.values, {}, {"masked": everywhere}, like=z)
    params = objective.model(z, torch.full((8,), T - 1), seen).params
    torch.testing.assert_close(
        terms["l2/label"], torch.nn.functional.cross_entropy(params["label"], whole.values["label"])
    )
    distribution = torch.distributions.Normal(params["masked"][:, :1], params["masked"][:, 1:].exp())
    hole = -distribution.log_prob(whole.values["image"])[..., 1::2]  # of the hidden columns, which are half of all
    torch.testing.assert_close(terms["l2/masked"], hole.mean() / 2)


def test_anchors_are_hidden_at_their_rate_unless_they_are_observed() -> None:
    count = 4000
    objective = build(MIXED, StateProbabilities(0.0, 0.25), anchor_hidden=0.4)
    aggregated, observed, denoised = objective.draw_states(batch(count), where(count))
    seen = observed["image"]
    assert not denoised[seen].any() and not aggregated["label"][~denoised].any()
    share = 0.6 * 0.75
    assert float(denoised.double().mean()) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / count))
    assert float(seen.double().mean()) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / count))


def test_a_head_that_predicts_the_anchor_learns_where_it_is_observed_and_stops_where_the_anchor_is() -> None:
    for masked in [ABSENT, OBSERVED]:
        whole = with_holes(batch())
        assert float(build(masked=masked)(whole, where()).terms["l2/masked"]) != 0
        assert float(build(masked=masked, image=OBSERVED)(whole, where()).terms["l2/masked"]) == 0
        whole.present["image"][:] = False
        assert float(build(masked=masked)(whole, where()).terms["l2/masked"]) == 0


def test_a_modality_without_a_schedule_is_never_in_z_t() -> None:
    """However it is called for: what a masked image encodes is not in the mean."""
    objective, whole = build(masked=AGGREGATED), with_holes(batch())
    other = Batch({**whole.values, "masked": whole.values["masked"] * 0}, whole.present)
    assert objective.weighted == ("label",)
    assert objective(whole, where()).terms["l1"] == objective(other, where()).terms["l1"]


# ------------------------------------------------------------------------------------------------------- timesteps


def test_times_are_spread_evenly_over_the_global_batch() -> None:
    """Every stratum of T / B timesteps holds one row, whatever the offset."""
    for count in [1, 4, 10, 20]:
        objective = build()
        for step in range(10):
            timesteps = objective.draw_timesteps(where(count, step), torch.ones(count, dtype=torch.bool))
            assert (timesteps // (T // count)).sort().values.tolist() == list(range(count))


def test_times_of_one_row_are_uniform_over_the_run() -> None:
    objective, steps = build(), 2000
    denoised = torch.ones(1, dtype=torch.bool)
    drawn = torch.cat(
        [objective.draw_timesteps(BatchPosition(step, torch.tensor([3]), 8), denoised) for step in range(steps)]
    )
    shares = torch.bincount(drawn, minlength=T) / steps
    assert len(shares) == T
    # each share is binomial with p = 1/T; 4.5 standard errors for 20 of them
    assert ((shares - 1 / T).abs() < 4.5 * math.sqrt(1 / T * (1 - 1 / T) / steps)).all()


# ------------------------------------------------------------------------------------------------------- gradients


def test_the_anchors_error_reaches_the_labels_table_only_through_what_is_shown() -> None:
    for distribution, reaches in [(AGGREGATED, True), (OBSERVED, True), (ABSENT, False)]:
        objective = build(distribution, label_weight=0.0, terminal_weight=0.0)
        objective(batch(), where()).loss.backward()
        gradient = objective.model.modalities["label"].table.grad
        assert (gradient is not None and bool(gradient.any())) is reaches


def test_learned_weights_receive_gradients() -> None:
    for learn_scale in [(), ("label",)]:
        objective = build(AGGREGATED, weight={"schedule": "learned", "scale": 1.0}, learn_scale=learn_scale)
        for _ in range(2):  # the table of live parameters is rebuilt for every step
            _, found = gradients(objective, (batch(), where()))
        assert found["schedule_shapes.label"].isfinite().all() and found["schedule_shapes.label"].any()
        assert ("schedule_scales.label" in found) == bool(learn_scale)


def test_a_step_leaves_the_scheduler_alone() -> None:
    objective = build(AGGREGATED, weight={"schedule": "learned", "scale": 1.0})
    scheduler, before = objective.scheduler, objective.scheduler.cumulative_weights("label").clone()
    with torch.no_grad():
        objective.schedule_shapes["label"][3] += 2.0
    state = dict(vars(scheduler))
    objective(batch(), where()).loss.backward()
    assert vars(scheduler) == state and not scheduler.cumulative_weights("label").requires_grad
    assert torch.equal(scheduler.cumulative_weights("label"), before)
    now = scheduler.with_learned_weights(objective.learned_weights()).cumulative_weights("label")
    assert now.requires_grad and not torch.equal(now, before)


def test_min_snr_weighs_every_row() -> None:
    """With all predictions v, the weight is min(SNR, γ) / (SNR + 1); by rows, one timestep each."""
    plain, weighted, whole, at = build(), build(min_snr_gamma=0.5), batch(), where()
    timesteps = plain.draw_timesteps(at, torch.ones(8, dtype=torch.bool))
    for k in range(8):
        snr = (lambda a: a / (1 - a))(float(plain.scheduler.alphas_cumprod[timesteps[k]]))
        one, other = (o(*rows(whole, at, torch.tensor([k]))).terms for o in (plain, weighted))
        expected = float(one["l1"] + one["l3"]) * min(snr, 0.5) / (snr + 1)
        assert float(other["l1"] + other["l3"]) == pytest.approx(expected, rel=1e-5)


def test_the_uncertainty_weighs_rows_that_are_denoised_and_no_others() -> None:
    """A fresh network tells σ = 1: half of the plain error; where the anchor is observed there is nothing to tell."""
    image = StateProbabilities(0.0, 0.4)
    plain, uncertain, whole, at = build(image=image), build(image=image, uncertainty=True), batch(), where()
    denoised = plain.draw_states(whole, at)[2]
    assert 0 < denoised.sum() < 8
    for k in range(8):
        one, other = (o(*rows(whole, at, torch.tensor([k]))).terms for o in (plain, uncertain))
        expected = float(denoised[k]) * (0.5 * float(one["l1"] + one["l3"]) + 0.5 * math.log(2 * math.pi))
        assert float(other["l1"] + other["l3"]) == pytest.approx(expected, rel=1e-5)
        assert float(other["l2/label"]) == float(one["l2/label"])


def test_the_uncertainty_is_told_by_the_network_and_learned() -> None:
    objective, whole, at = build(uncertainty=True), batch(), where()
    torch.nn.init.constant_(objective.log_std.bias, -1.0)  # σ = 1 / e everywhere
    plain = build()(whole, at).terms
    (output,), found = gradients(objective, (whole, at))
    expected = 0.5 * math.e**2 * (plain["l1"] + plain["l3"]) - 1 + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(output.terms["l1"] + output.terms["l3"], expected)
    error = (plain["l1"] + plain["l3"]).item()
    assert found["log_std.bias"].item() == pytest.approx(1 - math.e**2 * error, rel=1e-4)  # 0 where σ² is the error
    assert found["log_std.weight"].any()  # it is told apart by what the network sees


def test_the_backbones_numbers_are_functions_of_seed_step_and_position() -> None:
    """A batch and its parts get the same; another step, another seed and another row get others."""
    backbone = {"kind": "dit", **DIT, "depth": 3, "token_drop": 0.5, "outer_blocks": 1}
    images = {"image": {"kind": "image", "channels": 1, "size": 8}}
    model, told = MTDiffusionModel(images, backbone), []
    model.backbone.register_forward_pre_hook(lambda _, arguments: told.append(arguments[2].random))
    whole = Batch({"image": batch().values["image"]}, {"image": torch.ones(8, dtype=torch.bool)})
    half = Batch({"image": whole.values["image"][4:]}, {"image": torch.ones(4, dtype=torch.bool)})
    for seed, step, rows, first in ((0, 5, whole, 0), (0, 5, half, 4), (0, 6, whole, 0), (1, 5, whole, 0)):
        objective = MTObjective(model, MTDiffusionScheduler(), {"image": ABSENT}, {}, seed=seed)
        objective(rows, BatchPosition(step, torch.arange(first, 8), 8))
    drawn, part, later, other = told
    assert drawn.shape == (8, 16) and drawn.min() >= 0 and drawn.max() < 1
    assert torch.equal(part, drawn[4:])
    assert len(torch.cat([drawn, later, other]).unique(dim=0)) == 24
