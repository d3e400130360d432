"""What training adds to the bound: learned weights, contrastive flow matching, representation alignment."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import yaml
from networks import random_model
from omegaconf import OmegaConf
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdiff import losses
from mmdiff.alignment import Alignment
from mmdiff.config import Config, load_config, parse_config
from mmdiff.data import Batch
from mmdiff.objective import BatchPosition, MTObjective, ObjectiveOutput, StateProbabilities
from mmdiff.randomness import normal
from mmdiff.schedulers import MTFlowMatchScheduler
from mmdiff.training import train
from mmdiff.training.tracking import MACHINE

Configure = Callable[..., Config]
MIXED = StateProbabilities(0.5, 0.3)
CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


def objective(alignment: dict[str, Any] | None = None, **settings: Any) -> MTObjective:
    """Flow matching of 8×8 images with labels, and an image that is sometimes observed."""
    model = random_model(
        {"image": {"kind": "image", "channels": 1, "size": 8}, "label": {"kind": "label", "num_classes": 3}}
    )
    scheduler = MTFlowMatchScheduler(num_train_timesteps=20, weights={"label": {"schedule": "bump", "scale": 0.5}})
    probabilities = {"image": StateProbabilities(0.0, 0.25), "label": MIXED}
    if alignment is not None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            settings["alignment"] = Alignment(model, **alignment)
    return MTObjective(model, scheduler, probabilities, {"label": 0.1}, **settings)


def batch(count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    values = {"image": torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1, "label": torch.arange(count) % 3}
    present = {name: torch.ones(count, dtype=torch.bool) for name in values}
    present["image"][2] = False
    return Batch(values, present)


def part(first: int, last: int, step: int = 5, order: list[int] | None = None) -> tuple[Batch, BatchPosition]:
    """The rows at some positions of a global batch of 8."""
    chosen, whole = torch.arange(first, last)[order] if order else torch.arange(first, last), batch()
    values, present = ({name: x[chosen] for name, x in half.items()} for half in whole[:2])
    return Batch(values, present), BatchPosition(step, chosen, 8)


def gradients(one: MTObjective, *parts: tuple[Batch, BatchPosition]) -> tuple[list[ObjectiveOutput], dict[str, Tensor]]:
    one.zero_grad()
    outputs = [one(*some) for some in parts]
    (sum(output.loss for output in outputs) / len(outputs)).backward()
    return outputs, {name: p.grad.clone() for name, p in one.named_parameters() if p.grad is not None}


def read_lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------- learned weights


@pytest.mark.parametrize("start", [1.0, 0.1])
@pytest.mark.parametrize("loss", [0.02, 0.5, 7.0, -0.3])
def test_a_learned_weight_has_its_gradient_and_its_optimum_in_closed_form(loss: float, start: float) -> None:
    """Eq. (22) by hand: d/dp = a (w L − ½)(1 − tanh²(a p/b)); the best w is 1/(2 L), and the bound where L < 0."""
    bound, speed = math.log(losses.WEIGHT_FACTOR), losses.WEIGHT_SPEED
    parameter = torch.full((1,), 0.07, requires_grad=True)
    weight, penalty = losses.learned_weight(parameter, start)
    (weight * loss + penalty).backward()
    by_hand = speed * (weight.item() * loss - 0.5) * (1 - math.tanh(0.07 * speed / bound) ** 2)
    assert parameter.grad.item() == pytest.approx(by_hand, rel=1e-5)
    assert losses.learned_weight(torch.zeros(1), start)[0].item() == pytest.approx(start)
    optimizer = torch.optim.Adam([parameter], lr=0.01)
    for _ in range(400):
        weight, penalty = losses.learned_weight(parameter, start)
        optimizer.zero_grad()
        (weight * loss + penalty).backward()
        optimizer.step()
    best, most = 1 / (2 * loss) if loss > 0 else math.inf, start * losses.WEIGHT_FACTOR
    assert weight.item() == pytest.approx(min(best, most), rel=0.01 if best < most else 0.1)
    if loss < 0:  # it turns back when the loss becomes positive
        (losses.learned_weight(parameter, start)[0] * 5 + penalty.detach()).backward()
        assert parameter.grad.item() > 1e-4


def test_learned_weights_start_from_the_fixed_ones() -> None:
    (one,), fixed = gradients(objective(), part(0, 8))
    (other,), learned = gradients(objective(learn_weights=True), part(0, 8))
    assert learned.keys() - fixed.keys() == {"log_weights.image", "log_weights.label"}
    for name, gradient in fixed.items():
        torch.testing.assert_close(learned[name], gradient)
    assert other.terms["weight/label"].item() == pytest.approx(0.1) and "weight/label" not in one.terms
    by_hand = [10 * (0.1 * one.terms["l2/label"] - 0.5), 10 * (one.terms["l1"] + one.terms["l3"] - 0.5)]
    assert learned["log_weights.label"].item() == pytest.approx(by_hand[0].item(), rel=1e-5)
    assert learned["log_weights.image"].item() == pytest.approx(by_hand[1].item(), rel=1e-5)
    torch.testing.assert_close(sum(other.parts.values()), other.loss)
    assert objective(learn_weights=True, terminal_weight=0.0).loss_weights == {"label": 0.1}


def test_learned_weights_are_saved_averaged_resumed_and_not_decayed(configure: Configure, tmp_path: Path) -> None:
    options = ["loss.weighting=learned", "train.weight_decay=50", "train.learning_rate=0.01", "train.warmup=0"]
    for optimizer in ["adamw", "muon"]:
        more = [*options, f"train.optimizer={optimizer}", "train.log_every=1"]
        whole = train(configure(*more, "train.steps=4", "train.checkpoint_every=2", f"output={tmp_path / optimizer}"))
        for file in ("weights", "ema"):
            saved = load_file(whole / "checkpoints" / "step-4" / f"{file}.safetensors")
            assert saved["log_weights.label"].abs() > 1e-4 and saved["log_weights.image"].shape == (1,)
        lines = read_lines(whole)
        moved = abs(math.log(lines[-1]["weight/label"] / lines[0]["weight/label"]))
        assert moved > 0.15  # three steps of ten times the rate; a decay would halve it at every step
        more = [*more, "train.steps=4", f"train.resume={whole / 'checkpoints' / 'step-2'}"]
        again = train(configure(*more, f"output={tmp_path / optimizer}-again"))
        one, other = (load_file(f / "checkpoints" / "step-4" / "weights.safetensors") for f in (whole, again))
        assert all(torch.equal(one[name], other[name]) for name in one)


# ----------------------------------------------------------------------------------------- contrastive flow matching


def test_the_contrastive_term_is_its_formula() -> None:
    """Row by row: the velocity of the neighbour, whose noise and image are its own, at this row's time."""
    one, whole, where = objective(contrastive=0.05), *part(0, 8)
    seen: list[Tensor] = []
    handle = one.model.register_forward_hook(lambda module, inputs, output: seen.append(output.prediction))
    terms = one(whole, where).terms
    handle.remove()
    present = whole.present["image"]
    z_0 = whole.values["image"] * present[:, None, None, None]
    velocity = normal(0, 5, "noise", where.positions, (1, 8, 8)) - z_0
    denoised = one.draw_states(whole, where)[2]
    pairs = [1, 0, 3, 2, 5, 4, 7, 6]
    counts = denoised & present[pairs]
    assert 0 < counts.sum() < denoised.sum() < 8
    negative = ((seen[0] - velocity[pairs]) ** 2).mean(dim=(1, 2, 3)) * counts
    positive = ((seen[0] - velocity) ** 2).mean(dim=(1, 2, 3)) * denoised
    torch.testing.assert_close(terms["contrastive"], negative.mean())
    expected = positive.mean() - 0.05 * negative.mean() + terms["l0"].float() + 0.1 * terms["l2/label"]
    torch.testing.assert_close(terms["loss"], expected)


@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_even_size_and_any_order_agree_on_their_pairs(size: int, teacher: Path) -> None:
    one = objective({**TEACHER, "pretrained": str(teacher), "teacher": "shuffled"}, contrastive=0.3, learn_weights=True)
    (whole,), expected = gradients(one, part(0, 8))
    split, actual = gradients(one, *(part(first, first + size) for first in range(0, 8, size)))
    mixed = one(*part(0, 8, order=[3, 0, 7, 5, 1, 2, 6, 4]))
    for name, term in whole.terms.items():
        mean = sum(output.terms[name] for output in split) / len(split)
        torch.testing.assert_close(mean, term, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mixed.terms[name], term, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("layer", "drop"), [(3, 0.0), (None, 0.75), (0, 0.75)])
def test_layers_of_a_transformer_are_aligned_where_they_see_all_places(
    configure: Configure, teacher: Path, layer: int | None, drop: float
) -> None:
    backbone = f"backbone={{kind: dit, depth: 4, width: 16, heads: 2, token_drop: {drop}, outer_blocks: 1}}"
    settings = {"model": NAME, "pretrained": str(teacher), "layer": layer}
    tree = yaml.safe_load(OmegaConf.to_yaml(OmegaConf.from_dotlist([backbone])))
    tree = {**configure().model_dump(), **tree, "loss": {"repa": settings}}
    folder = train(parse_config(tree))
    assert all(line["repa"] != 0 for line in read_lines(folder))
    if drop:
        with refused("loss.repa.layer", 2):
            train(parse_config({**tree, "output": "other", "loss": {"repa": {**settings, "layer": 2}}}))


def test_what_does_not_fit_together_is_refused(configure: Configure, teacher: Path) -> None:
    flow = ["scheduler.kind=flow_match", "loss.contrastive=0.05"]
    with refused("loss.contrastive", 0.05):
        train(configure("loss.contrastive=0.05"))
    with refused("loss.contrastive", 0.05):
        train(configure(*flow, "scheduler.prediction_type=sample"))
    with refused("loss.contrastive", 0.05, "uncertainty"):
        configure(*flow, "loss.uncertainty=true")
    with refused("loss.uncertainty", True):
        configure("loss.uncertainty=true", "loss.weighting=learned")
    shuffled = f"loss.repa={{model: {NAME}, pretrained: {teacher}, teacher: shuffled}}"
    for options in [flow, [shuffled]]:
        with refused("train.batch_size", 12, "4"):
            train(configure(*options, "train.accumulate=4"))
    for key, value in [("layer", 99), ("model", "ViT-B-3"), ("pretrained", "nowhere.pt")]:
        settings = {"model": NAME, "pretrained": str(teacher), key: value}
        with refused(f"loss.repa.{key}", value):
            train(configure(f"loss.repa={json.dumps(settings)}"))
    for settings in [{"model": "timm:vit_nowhere"}, {"model": "timm:test_vit", "pretrained": "weights.pt"}]:
        with refused(f"loss.repa.{list(settings)[-1]}", list(settings.values())[-1]):
            train(configure(f"loss.repa={json.dumps({'pretrained': None, **settings})}"))


# ------------------------------------------------------------------------------------------- representation alignment

NAME = "tiny-teacher"
TEACHER = {"model": NAME}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model of open_clip, which is listed."""
    folder = tmp_path_factory.mktemp("teacher")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / f"{NAME}.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(open_clip.create_model(NAME).state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.mark.parametrize("layer", [None, 0, 2])
def test_the_alignment_is_the_mean_cosine_over_places(teacher: Path, layer: int | None) -> None:
    """By hand: the tower's tokens without its class token, after its last norm; 4×4 places on the features' grid."""
    one = objective({**TEACHER, "pretrained": str(teacher), "layer": layer})
    whole, where = part(0, 8)
    seen: list[Any] = []
    backbone = one.model.backbone
    (backbone if layer is None else backbone.blocks()[layer]).register_forward_hook(lambda *call: seen.append(call[2]))
    output = one(whole, where)
    features = seen[0].features if layer is None else seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    tower = open_clip.create_model(NAME, str(teacher)).visual.eval()
    mean, std = (torch.tensor(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    images = whole.values["image"].expand(-1, 3, -1, -1) * whole.present["image"][:, None, None, None]
    large = torch.nn.functional.interpolate(images, (16, 16), mode="bicubic", antialias=True)
    tower.output_tokens = True
    with torch.no_grad():
        tokens = tower(((large + 1) / 2 - mean) / std)[1].mT.unflatten(2, (4, 4))
    size = features.shape[2:]
    targets = torch.nn.functional.interpolate(tokens, size, mode="bilinear", antialias=True)
    cosine = torch.cosine_similarity(one.alignment.projector(features), targets, dim=1).mean(dim=(1, 2))
    denoised = one.draw_states(whole, where)[2]
    torch.testing.assert_close(output.terms["repa"], -(cosine * denoised).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.parts["repa"].detach(), 0.5 * output.terms["repa"])


def test_the_teacher_is_frozen_the_projector_learns_and_the_pipeline_has_neither(
    configure: Configure, teacher: Path
) -> None:
    one = objective({**TEACHER, "pretrained": str(teacher)})
    before = {name: value.clone() for name, value in one.alignment.teacher.network.state_dict().items()}
    one.train()
    _, found = gradients(one, part(0, 8))
    network = one.alignment.teacher.network
    assert not network.training and all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(found[f"alignment.projector.{k}.{kind}"].any() for k in (0, 2, 4) for kind in ("weight", "bias"))
    folder = train(configure(f"loss.repa={{model: {NAME}, pretrained: {teacher}, until: 4}}", "train.log_every=1"))
    saved = load_file(folder / "checkpoints" / "step-6" / "weights.safetensors")
    assert "alignment.projector.0.weight" in saved and not any("teacher" in name for name in saved)
    pipeline = load_file(folder / "pipeline" / "model" / "diffusion_pytorch_model.safetensors")
    assert not any("alignment" in name or "projector" in name for name in pipeline)
    terms = [line["repa"] for line in read_lines(folder)]
    assert all(-1 <= term < 1 and term != 0 for term in terms[:4]) and terms[4:] == [0.0, 0.0]


def test_from_the_last_step_on_the_term_is_gone_to_the_bit(teacher: Path) -> None:
    settings = {**TEACHER, "pretrained": str(teacher), "until": 5}
    (plain,), expected = gradients(objective(), part(0, 8))
    (over,), found = gradients(objective(settings), part(0, 8, step=5))
    assert torch.equal(plain.loss, over.loss) and over.terms["repa"] == 0
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert not any(gradient.any() for name, gradient in found.items() if "projector" in name)
    _, before = gradients(objective(settings), part(0, 8, step=4))
    (without,), earlier = gradients(objective(), part(0, 8, step=4))
    assert any(not torch.equal(before[name], gradient) for name, gradient in earlier.items())


def test_a_shuffled_teacher_changes_the_alignment_and_nothing_else(teacher: Path) -> None:
    own, shuffled = (
        objective({**TEACHER, "pretrained": str(teacher), "teacher": kind})(*part(0, 8)).terms
        for kind in ("own", "shuffled")
    )
    assert own.keys() == shuffled.keys()
    assert {name for name in own if not torch.equal(own[name], shuffled[name])} == {"repa", "loss"}


@pytest.mark.slow
def test_two_processes_compute_all_terms_as_one_does(
    tiny: dict[str, Any], teacher: Path, forked: Callable[..., Any], tmp_path: Path
) -> None:
    """Past the last step of the alignment too: its projector still has gradients there."""
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    shutil.copy(teacher, folder / "open_clip_model.safetensors")
    repa = {"model": f"local-dir:{folder}", "pretrained": None, "layer": 1, "until": 4, "teacher": "shuffled"}
    tree = {**tiny, "loss": {"weighting": "learned", "contrastive": 0.05, "repa": repa}}
    OmegaConf.save(OmegaConf.create({**tree, "scheduler": {"kind": "flow_match"}}), tmp_path / "all.yaml")
    arguments = ["train", tmp_path / "all.yaml", f"output={tmp_path / 'two'}"]
    two = forked(arguments, tmp_path / "log", processes=2)
    one = train(load_config(tmp_path / "all.yaml", ["train.accumulate=3"]))
    answer = two.wait()
    assert answer.code == 0, answer.err
    for a, b in zip(*(read_lines(path) for path in (one, tmp_path / "two")), strict=True):
        shared = {key: value for key, value in a.items() if key not in MACHINE}
        assert {"contrastive", "repa", "weight/label"} < set(shared)
        assert {key: b[key] for key in shared} == pytest.approx(shared, rel=1e-4, abs=1e-7)


def test_an_encoder_of_timm_is_read_from_a_local_file(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("test_vit", num_classes=5).eval()  # with a head, which is not read
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    one = objective({"model": "timm:test_vit", "pretrained": str(tmp_path / "weights.safetensors")})
    images = batch().values["image"]
    side = one.alignment.teacher.size[0]
    data = timm.data.resolve_model_data_config(network)
    large = torch.nn.functional.interpolate(images.expand(-1, 3, -1, -1), (side, side), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(data[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        tokens = network.forward_features(((large + 1) / 2 - mean) / std)[:, network.num_prefix_tokens :]
    torch.testing.assert_close(one.alignment.teacher(images).flatten(2).mT, tokens)
    assert one(*part(0, 8)).terms["repa"] != 0
