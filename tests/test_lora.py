"""LoRA trains what it should and nothing else; an adapter is loaded, merged and taken out again, bit by bit."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import DIFFUSERS_DIT, DIFFUSERS_UNET, LAYERS, alive
from peft import PeftModel
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdiff import lora
from mmdiff.config import Config
from mmdiff.model import MTDiffusionModel
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.schedulers import MTDiffusionScheduler
from mmdiff.training import train
from mmdiff.training.dry_run import dry_run

MODALITIES = {"image": {"kind": "image", "channels": 3, "size": 8}, "label": {"kind": "label", "num_classes": 3}}
BACKBONES: dict[str, dict[str, Any]] = {
    "unet": LAYERS,
    "dit": {"depth": 2, "width": 16, "heads": 2},
    "diffusers_unet": {"network": DIFFUSERS_UNET},
    "diffusers_dit": {"network": DIFFUSERS_DIT},
}


def model_of(kind: str, seed: int = 0) -> MTDiffusionModel:
    torch.manual_seed(seed)
    return alive(MTDiffusionModel(copy.deepcopy(MODALITIES), {"kind": kind, **BACKBONES[kind]}))


def pipeline_of(kind: str) -> MTDiffusionPipeline:
    return MTDiffusionPipeline(model_of(kind), MTDiffusionScheduler(num_train_timesteps=20))


@torch.no_grad()
def outputs(model: MTDiffusionModel) -> list[Tensor]:
    dtype = next(model.parameters()).dtype
    z_t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)
    here = {"label": torch.ones(3, dtype=torch.bool)}
    seen = model.observation({"label": torch.tensor([0, 1, 2])}, {}, here, like=z_t)
    output = model(z_t, torch.tensor([1, 7, 19]), seen)
    return [output.prediction, output.params["label"]]


def adapter_of(kind: str, folder: Path, **settings: Any) -> MTDiffusionModel:
    """A model with trained LoRA layers, and its folder."""
    model = model_of(kind)
    lora.add(model, **{"rank": 2, "alpha": 3, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    lora.save(model, folder)
    return model.requires_grad_()


def state_of(model: MTDiffusionModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("kind", BACKBONES)
def test_fresh_layers_change_nothing_and_what_trains_is_theirs_and_the_modalities(kind: str) -> None:
    for whole in (True, False):
        model, before = model_of(kind), model_of(kind)
        names = {name for name, _ in model.named_parameters()}
        lora.add(model, rank=2, whole=whole)
        assert all(map(torch.equal, outputs(model), outputs(before)))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        layers = {name for name in trained if ".lora_" in name}
        assert layers and {lora.base_name(name) for name, _ in model.named_parameters()} - layers == names
        parts = tuple(f"backbone.{part}" for part in model.backbone.modality_parts) + ("modalities.",)
        assert trained - layers == ({name for name in names if name.startswith(parts)} if whole else set())
        loss = sum(out.square().sum() for out in (model(*_inputs(model)).prediction, model(*_inputs(model)).pooled))
        loss.backward()
        moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert {name for name in layers if ".lora_B." in name} <= moved <= trained


def _inputs(model: MTDiffusionModel) -> tuple:
    z_t = torch.randn(3, 3, 8, 8)
    return z_t, torch.tensor([1, 7, 19]), model.observation({}, {}, {}, like=z_t)


@pytest.mark.parametrize("kind", BACKBONES)
def test_an_adapter_is_saved_loaded_merged_and_taken_out(kind: str, tmp_path: Path) -> None:
    trained, pipeline = adapter_of(kind, tmp_path / "adapter"), pipeline_of(kind)
    model, before, expected = pipeline.model, state_of(pipeline.model), outputs(trained)
    grads = [p.requires_grad for p in model.parameters()]
    assert not torch.allclose(outputs(model)[0], expected[0], atol=1e-3)
    for fused in (False, True):
        pipeline.load_lora_weights(tmp_path / "adapter")
        assert all(map(torch.equal, outputs(model), expected))
        if fused:
            pipeline.fuse_lora()
            torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-4)
            assert state_of(model).keys() == before.keys()
        pipeline.unload_lora_weights()
        assert same(state_of(model), before) and [p.requires_grad for p in model.parameters()] == grads
    double = trained.double()
    torch.testing.assert_close(outputs(lora.merged(double)), outputs(double), rtol=0, atol=1e-11)
    pipeline.load_lora_weights(tmp_path / "adapter")
    pipeline.save_pretrained(tmp_path / "saved")
    saved = MTDiffusionPipeline.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(outputs(saved.model), expected, rtol=1e-4, atol=1e-4)


def test_the_folder_is_pefts(tmp_path: Path) -> None:
    trained = adapter_of("unet", tmp_path / "adapter", whole=False)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [lora.CONFIG, lora.LAYERS]
    theirs = PeftModel.from_pretrained(model_of("unet"), str(tmp_path / "adapter")).requires_grad_()
    assert all(map(torch.equal, outputs(theirs.base_model.model), outputs(trained)))


@pytest.mark.parametrize("targets", [["to_q"], ["to_out.0", "linear_1"], ["mid_block.attentions.0.to_k"]])
def test_targets_are_ends_of_names(targets: list[str]) -> None:
    model = model_of("unet")
    lora.add(model, rank=2, targets=targets)
    assert {name for name in lora.layers(model) if not any(name.endswith(f".{end}") for end in targets)} == set()
    for end in targets:
        assert any(name.endswith(end) for name in lora.layers(model))
    for wrong in ("q", "conv1", "flags.0", "to_q*"):
        with refused("train.lora.targets", wrong):
            lora.add(model_of("unet"), rank=2, targets=[wrong])


# --------------------------------------------------------------------------------------------------------------- runs


def test_a_run_trains_adapters_on_a_source(
    configure: Callable[..., Config], finished_run: Path, tmp_path: Path
) -> None:
    def run(name: str, *more: str) -> Path:
        settings = [f"output={tmp_path / name}", f"train.initialize_from={finished_run}", "train.lora.rank=4"]
        return train(configure("train.optimizer=muon", "train.checkpoint_every=3", *settings, *more), progress=False)

    stopped = run("stopped", "train.steps=3", "train.lr_scheduler_type=constant")
    whole = run("whole", "train.lr_scheduler_type=constant")
    run("stopped", "train.lr_scheduler_type=constant", "train.resume=auto")
    for part in ("weights", "ema", "optimizer"):  # resumed bit by bit
        one, other = (load_file(r / "checkpoints" / "step-6" / f"{part}.safetensors") for r in (stopped, whole))
        assert same(one, other), part
    base = MTDiffusionPipeline.from_pretrained(finished_run / "pipeline")
    source, weights = base.model.state_dict(), load_file(whole / "checkpoints" / "step-6" / "weights.safetensors")
    frozen = [name for name in weights if "lora_" not in name and ".unet." in name and "conv_in" not in name]
    averages = load_file(whole / "checkpoints" / "step-6" / "ema.safetensors")
    for tensors in (weights, averages):
        for name in set(frozen) & set(tensors):
            assert torch.equal(tensors[name], source[lora.base_name(name).removeprefix("model.")]), name
    assert all(weights[name].any() for name in weights if ".lora_B." in name)
    merged = MTDiffusionPipeline.from_pretrained(whole / "pipeline")
    assert merged.model.state_dict().keys() == source.keys()  # it needs no peft
    again = train(
        configure(f"output={tmp_path / 'again'}", f"backbone.initialize_from={whole}", "train.learning_rate=1e-20"),
        progress=False,
    )  # from its checkpoint
    found = load_file(again / "pipeline" / "model" / "diffusion_pytorch_model.safetensors")
    for name, tensor in merged.model.backbone.state_dict().items():
        torch.testing.assert_close(found[f"backbone.{name}"], tensor, rtol=1e-5, atol=1e-6)
    base.load_lora_weights(whole / "adapter")
    base.fuse_lora()
    assert same(state_of(base.model), state_of(merged.model))


def test_a_dry_run_counts_what_is_trained(configure: Callable[..., Config], finished_run: Path) -> None:
    image = ["modalities.image.channels=1", "modalities.image.size=8", "modalities.label.num_classes=10"]
    adapted = dry_run(configure(*image, f"train.initialize_from={finished_run}", "train.lora.only_adapters=true"))
    numbers = r"^(?:parameters)? +([\d,]+)(?: of them are trained)?$"
    found = re.findall(numbers, dry_run(configure(*image)) + "\n" + adapted, re.MULTILINE)
    before, now, trained = (int(count.replace(",", "")) for count in found)
    assert now - before == trained > 0


def test_without_peft_or_a_source_it_is_one_line(
    configure: Callable[..., Config], finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused("train.lora"):
        configure("train.lora.rank=4")
    monkeypatch.setitem(sys.modules, "peft", None)
    with refused("train.lora", "peft", "mmdiff[lora]"):
        train(configure("train.lora.rank=4", f"train.initialize_from={finished_run}"), progress=False)


# ------------------------------------------------------------------------------------------------------- bad adapters


def edit(folder: Path, **entries: Any) -> None:
    file = folder / lora.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def change(folder: Path, spoil: Callable[[dict[str, Tensor]], object], file: str = lora.LAYERS) -> None:
    tensors = load_file(folder / file)
    spoil(tensors)
    save_file(tensors, folder / file)


def first(tensors: dict[str, Tensor]) -> Tensor:
    return tensors[sorted(tensors)[0]]


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / lora.LAYERS), folder / "adapter_model.bin")
    (folder / lora.LAYERS).unlink()


def linked(folder: Path) -> None:
    (folder / lora.LAYERS).rename(folder.parent / "outside")
    (folder / lora.LAYERS).symlink_to(folder.parent / "outside")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda f: f.rename(f.with_name("other")), "lora"),
    "no config": (lambda f: (f / lora.CONFIG).unlink(), "lora"),
    "no JSON": (lambda f: (f / lora.CONFIG).write_text("{"), "lora"),
    "deep": (lambda f: (f / lora.CONFIG).write_text("[" * 100_000), "lora"),
    "a list": (lambda f: (f / lora.CONFIG).write_text("[]"), "lora"),
    "pickle": (pickled, "lora"),
    "link": (linked, "lora"),
    "damaged": (lambda f: (f / lora.LAYERS).write_bytes(b"\xff" * 100), "lora"),
    "another method": (lambda f: edit(f, peft_type="LOHA"), "adapter_config.json: peft_type"),
    "DoRA": (lambda f: edit(f, use_dora=True), "adapter_config.json: use_dora"),
    "code": (lambda f: edit(f, megatron_config={}, megatron_core="os"), "adapter_config.json: megatron_config"),
    "rank": (lambda f: edit(f, r=10**12), "adapter_config.json: r"),
    "another rank": (lambda f: edit(f, r=3), "lora"),
    "alpha": (lambda f: edit(f, lora_alpha="x"), "adapter_config.json: lora_alpha"),
    "an expression": (lambda f: edit(f, target_modules="(a+)+$"), "adapter_config.json: target_modules"),
    "another layer": (lambda f: edit(f, target_modules=["to_x"]), "adapter_config.json: target_modules"),
    "not finite": (lambda f: change(f, lambda t: first(t).fill_(float("inf"))), "lora"),
    "a tensor too few": (lambda f: change(f, lambda t: t.pop(sorted(t)[0])), "lora"),
    "a tensor too many": (lambda f: change(f, lambda t: t.update(more=torch.zeros(1))), "lora"),
    "unknown whole": (lambda f: change(f, lambda t: t.update(more=torch.zeros(1)), lora.WHOLE), "lora"),
    "a shape": (lambda f: change(f, lambda t: t.update({sorted(t)[0]: torch.zeros(9)}), lora.WHOLE), "lora"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_adapter_that_does_not_fit_is_one_line_and_changes_nothing(case: str, tmp_path: Path) -> None:
    adapter_of("unet", tmp_path / "adapter")
    spoil, key = BAD[case]
    spoil(tmp_path / "adapter")
    pipeline = pipeline_of("unet")
    before = state_of(pipeline.model)
    with refused(key):
        pipeline.load_lora_weights(tmp_path / "adapter")
    assert same(state_of(pipeline.model), before)


def test_one_adapter_at_a_time(tmp_path: Path) -> None:
    adapter_of("unet", tmp_path / "adapter")
    pipeline = pipeline_of("unet")
    for call in (pipeline.fuse_lora, pipeline.unload_lora_weights):
        with refused("lora", None):
            call()
    pipeline.load_lora_weights(tmp_path / "adapter")
    with refused("lora", str(tmp_path / "adapter")):
        pipeline.load_lora_weights(tmp_path / "adapter")
