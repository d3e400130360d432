"""A run starts from a network of diffusers: it predicts and samples what its source does; bad sources are one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    PNDMScheduler,
    UNet2DModel,
)
from networks import DIFFUSERS_DIT, DIFFUSERS_UNET, alive
from refusals import refused
from safetensors.torch import load_file, save_file

from mmdiff.build import build_model, build_objective, build_scheduler
from mmdiff.config import Config, load_config, parse_config
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.pretrained import find
from mmdiff.resolve import resolve
from mmdiff.training import train
from mmdiff.training.initialize import initialize_backbone

KEY = "backbone.initialize_from"
IMAGE = {"kind": "image", "channels": 3, "size": 8}
LABEL = {"kind": "label", "num_classes": 3, "weight": {"schedule": "bump"}}


def unet_folder(folder: Path, scheduler: Any = None, **settings: Any) -> Path:
    """A random `UNet2DModel` in a DDPM pipeline."""
    torch.manual_seed(0)
    scheduler = scheduler or DDPMScheduler()
    pipeline = DDIMPipeline if isinstance(scheduler, DDIMScheduler) else DDPMPipeline
    pipeline(alive(UNet2DModel(**{**DIFFUSERS_UNET, **settings})), scheduler).save_pretrained(folder)
    return folder


def dit_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    alive(DiTTransformer2DModel(**DIFFUSERS_DIT, out_channels=6)).save_pretrained(folder)
    return folder


def config(source: Path | str | None, modalities: dict[str, Any] | None = None, **sections: Any) -> Config:
    backbone = {**({} if source is None else {"initialize_from": str(source)}), **sections.pop("backbone", {})}
    modalities = {"image": IMAGE} if modalities is None else {"image": IMAGE, **modalities}
    tree = {"name": "x", "data": {"source": "digits"}, "modalities": modalities, "backbone": backbone}
    return resolve(parse_config({**tree, **sections}), None)


def started(resolved: Config, said: list[str] | None = None) -> MTDiffusionPipeline:
    """A pipeline with the weights that training starts from."""
    model, scheduler = build_model(resolved), build_scheduler(resolved)
    say = (said if said is not None else []).append
    initialize_backbone(build_objective(resolved, model, scheduler), resolved, say)
    pipeline = MTDiffusionPipeline(model.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ------------------------------------------------------------------------------------------------------------ samples

SCHEDULERS = {
    "DDPM": DDPMScheduler(),
    "DDPM, clipped, trailing": DDPMScheduler(timestep_spacing="trailing", clip_sample_range=0.7),
    "DDPM, sigmoid betas, large variance": DDPMScheduler(beta_schedule="sigmoid", variance_type="fixed_large"),
    "DDPM, cosine v": DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    "DDIM": DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False, clip_sample=False),
    "DDIM, clipped": DDIMScheduler(),
    "DDIM, zero SNR": DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_samples_are_those_of_the_source(scheduler: str, tmp_path: Path) -> None:
    source = unet_folder(tmp_path / "source", SCHEDULERS[scheduler])
    pipeline = started(config(source))
    theirs = DiffusionPipeline.from_pretrained(source)
    theirs.set_progress_bar_config(disable=True)
    clipped = {"use_clipped_model_output": True} if scheduler == "DDIM, clipped" else {}  # see docs/training.md
    expected = theirs(2, torch.Generator().manual_seed(1), num_inference_steps=10, output_type="np", **clipped)
    found = pipeline(2, num_inference_steps=10, generator=torch.Generator().manual_seed(1), output_type="pt")
    images = (found.samples["image"].permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)
    assert images.std() > 0.1
    torch.testing.assert_close(images, torch.tensor(expected.images), rtol=0, atol=2e-4)


@torch.no_grad()
def test_a_dit_samples_like_its_pipeline_at_the_null_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = alive(DiTTransformer2DModel(**DIFFUSERS_DIT, out_channels=6))
    scheduler = DDIMScheduler(clip_sample=False)
    DiTPipeline(network, AutoencoderKL(latent_channels=3), scheduler).save_pretrained(tmp_path / "source")
    pipeline = started(config(tmp_path / "source", scheduler={"clip_sample": False}))
    z_t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(10)
    for timestep in scheduler.timesteps:
        prediction = network(z_t, timestep.expand(2), torch.tensor([10, 10])).sample[:, :3]
        z_t = scheduler.step(prediction, timestep, z_t).prev_sample
    found = pipeline(2, num_inference_steps=10, generator=torch.Generator().manual_seed(1), output_type="pt")
    torch.testing.assert_close(found.samples["image"], z_t, rtol=1e-3, atol=1e-4 * float(z_t.abs().max()))


def test_the_config_may_choose_another_solver_and_is_told_of_another_path(tmp_path: Path) -> None:
    source, said = unet_folder(tmp_path / "source"), []
    assert config(source).scheduler.solver == "DDPMScheduler"
    other = config(source, scheduler={"solver": "DPMSolverMultistepScheduler", "prediction_type": "v_prediction"})
    found = other.scheduler
    assert (found.solver, found.prediction_type) == ("DPMSolverMultistepScheduler", "v_prediction")
    assert (found.beta_schedule, found.timestep_spacing) == ("linear", "leading")
    started(other, said)
    assert [line.split(":")[0] for line in said if line.startswith("warning")] == ["warning"]
    assert "scheduler.prediction_type" in said[-1] and "epsilon" in said[-1]
    cosine = config(source, scheduler={"beta_schedule": "squaredcos_cap_v2"})
    assert cosine.scheduler.beta_schedule == "squaredcos_cap_v2"


def test_a_solver_that_is_none_of_ours_leaves_its_path(tmp_path: Path) -> None:
    said: list[str] = []
    unet_folder(tmp_path / "source")
    PNDMScheduler(beta_end=0.01).save_pretrained(tmp_path / "source" / "scheduler")
    resolved = config(tmp_path / "source")
    assert (resolved.scheduler.beta_end, resolved.scheduler.prediction_type) == (0.01, "epsilon")
    assert resolved.scheduler.solver == "DPMSolverMultistepScheduler"
    started(resolved, said)
    assert any("PNDMScheduler" in line for line in said)


# ------------------------------------------------------------------------------------------------------------ configs


def test_a_resolved_config_needs_the_source_no_more(tmp_path: Path) -> None:
    for made in (unet_folder, dit_folder):
        source = made(tmp_path / made.__name__)
        resolved = config(source, {"label": LABEL})
        pipeline = started(resolved)
        shutil.rmtree(source)
        assert resolve(parse_config(resolved.model_dump(mode="json")), None) == resolved
        pipeline.save_pretrained(tmp_path / "saved")
        back = MTDiffusionPipeline.from_pretrained(tmp_path / "saved")
        assert type(back.model.backbone) is type(pipeline.model.backbone)
        assert all(map(torch.equal, pipeline.model.state_dict().values(), back.model.state_dict().values()))
        with refused(KEY, str(source)):  # a new run takes weights
            started(resolved)


@pytest.mark.parametrize("given", ["dit", "diffusers_dit", None])
def test_the_source_says_the_kind(given: str | None, tmp_path: Path) -> None:
    resolved = config(dit_folder(tmp_path / "dit"), backbone={} if given is None else {"kind": given})
    assert resolved.backbone.kind == "diffusers_dit" and resolved.backbone.network["num_layers"] == 2
    with refused("backbone.kind", "unet"):
        config(tmp_path / "dit", backbone={"kind": "unet"})


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_folders_of_older_versions(tmp_path: Path) -> None:
    source = unet_folder(tmp_path / "source")  # google/ddpm-…: everything in one folder, other names
    expected = load_file(source / "unet" / "diffusion_pytorch_model.safetensors")
    for file in (*(source / "unet").iterdir(), *(source / "scheduler").iterdir()):
        file.rename(source / file.name)
    renamed = {name: tensor for name, tensor in expected.items() if "attentions" not in name}
    for name in expected.keys() - renamed.keys():
        old = next((name.replace(new, old) for new, old in OLD_NAMES.items() if new in name), name)
        renamed[old] = expected[name]
    assert renamed.keys() != expected.keys()
    save_file(renamed, source / "diffusion_pytorch_model.safetensors")
    resolved = config(source)
    assert resolved.scheduler.solver == "DDPMScheduler"
    found = started(resolved).model.backbone.network.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    older = dit_folder(tmp_path / "older") / "config.json"  # facebook/DiT-XL-2-256: the class had another name
    more = {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "only_cross_attention": False}
    older.write_text(json.dumps({**json.loads(older.read_text()), **more}))
    assert started(config(older.parent)).model.backbone.network.config.num_layers == 2


def test_a_network_may_be_described_without_a_source() -> None:
    resolved = config(None, backbone={"kind": "diffusers_unet", "network": DIFFUSERS_UNET})
    assert resolved.backbone.network["norm_eps"] == 1e-5 and resolve(resolved, None) == resolved
    build_model(resolved)
    for network in (None, {}, {"smell": 1}, [], "x"):
        with refused(ANY, ANY):
            build_model(config(None, backbone={"kind": "diffusers_dit", "network": network}))


def test_where_a_network_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = unet_folder(tmp_path / "source")
    for place in (source, source / "unet"):
        found = find(str(place))
        assert found.kind == "diffusers_unet" and found.scheduler["prediction_type"] == "epsilon"
    hub = tmp_path / "hub" / "models--someone--ddpm"
    shutil.copytree(source, hub / "snapshots" / ("a" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find("someone/ddpm").network == ("someone/ddpm", "unet")
    pipeline = started(config("someone/ddpm"))
    weights = load_file(source / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(pipeline.model.backbone.network.state_dict()[name], one) for name, one in weights.items())
    with refused(KEY, "someone/else"):
        find("someone/else")


# ------------------------------------------------------------------------------------------------------- bad sources

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def edit(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def poison(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def linked(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "outside.safetensors")


def escaping(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "../../outside.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


UNET_CONFIG, SCHEDULER_CONFIG = Path("unet") / "config.json", Path("scheduler") / "scheduler_config.json"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: (shutil.rmtree(f), f.mkdir()), KEY),
    "gone": (shutil.rmtree, KEY),
    "pickle": (pickled, KEY),
    "link": (linked, KEY),
    "shard outside": (escaping, KEY),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), KEY),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:500]), KEY),
    "not finite": (lambda f: poison(f, lambda t: t["conv_in.bias"].fill_(float("nan"))), KEY),
    "a tensor too few": (lambda f: poison(f, lambda t: t.pop("conv_in.bias")), KEY),
    "a tensor too many": (lambda f: poison(f, lambda t: t.update(more=t["conv_in.bias"].clone())), KEY),
    "another shape": (lambda f: poison(f, lambda t: t.update({"conv_in.bias": torch.zeros(3)})), KEY),
    "no JSON": (lambda f: (f / UNET_CONFIG).write_text("{"), KEY),
    "deep JSON": (lambda f: (f / UNET_CONFIG).write_text("[" * 100_000), KEY),
    "a list": (lambda f: (f / UNET_CONFIG).write_text("[]"), KEY),
    "another class": (lambda f: edit(f / UNET_CONFIG, _class_name="AutoencoderKL"), KEY),
    "a class of its own": (lambda f: edit(f / "model_index.json", unet=["my_code", "UNet2DModel"]), KEY),
    "two networks": (lambda f: edit(f / "model_index.json", more=["diffusers", "UNet2DModel"]), KEY),
    "words": (lambda f: edit(f / UNET_CONFIG, layers_per_block="many"), "backbone.network"),
    "huge": (lambda f: edit(f / UNET_CONFIG, layers_per_block=10**12), "backbone.network.layers_per_block"),
    "quantized": (lambda f: edit(f / UNET_CONFIG, quantization_config={}), "backbone.network.quantization_config"),
    "channels": (lambda f: edit(f / UNET_CONFIG, in_channels=4), "backbone.network.in_channels"),
    "trained on words": (lambda f: edit(f / SCHEDULER_CONFIG, beta_start="low"), ""),
    "trained for ever": (lambda f: edit(f / SCHEDULER_CONFIG, num_train_timesteps=10**12), ""),
}


@pytest.mark.parametrize("case", BAD)
def test_a_source_that_cannot_be_used_is_one_line(case: str, tmp_path: Path) -> None:
    spoil, key = BAD[case]
    spoil(unet_folder(tmp_path / "source"))
    if not key:  # the weights can be used, the scheduler is the config's own
        said: list[str] = []
        started(config(tmp_path / "source"), said)
        assert any(line.startswith("warning: scheduler") for line in said)
        return
    with refused(key):
        started(config(tmp_path / "source"))


def test_settings_that_contradict_the_source_are_refused(tmp_path: Path) -> None:
    source = unet_folder(tmp_path / "source")
    other = {**find(str(source)).settings["network"], "norm_eps": 1e-3}
    with refused("backbone.network.norm_eps", 1e-3):
        started(config(source, backbone={"kind": "diffusers_unet", "network": other}))
    with refused("backbone.network.norm_eps", 1e-3):
        config(source, backbone={"network": {"norm_eps": 1e-3}})
    dropping = config(source, backbone={"network": {"dropout": 0.5}})  # changes no prediction
    assert dropping.backbone.network == {**find(str(source)).settings["network"], "dropout": 0.5}
    started(dropping)
    with refused("backbone.patch_size", 2):
        config(source, backbone={"patch_size": 2})
    with refused("train.initialize_from", str(source)):
        config(source, train={"initialize_from": str(source)})


# --------------------------------------------------------------------------------------------------------- real runs


def test_runs_start_from_networks_and_from_runs(configure: Callable[..., Config], tmp_path: Path) -> None:
    size = {"in_channels": 1, "out_channels": 1, "sample_size": 8}
    source = unet_folder(tmp_path / "source", **size)
    same = ["train.learning_rate=1e-12", "train.steps=2", "modalities.label.weight.schedule=bump"]
    tree = configure(*same).model_dump(mode="json", exclude_unset=True)
    tree["backbone"] = {"initialize_from": str(source), "context_grid": 2, "pooled_grid": 2}
    del tree["scheduler"]
    first = train(parse_config({**tree, "output": str(tmp_path / "first")}), progress=False)
    origin = json.loads((first / "origin.json").read_text())
    assert origin["backbone"]["initialize_from"] == str(source)
    shutil.rmtree(source)
    weights = load_file(first / "pipeline" / "model" / "diffusion_pytorch_model.safetensors")
    for place in (first, first / "checkpoints" / "step-2"):
        tree["backbone"] = {"initialize_from": str(place)}
        tree["modalities"]["more"] = {"kind": "image", "channels": 1, "weight": {"schedule": "bump"}}
        tree["data"] = {**tree["data"], "columns": {"more": "image"}}
        again = train(parse_config({**tree, "output": str(tmp_path / f"again-{place.name}")}), progress=False)
        found = load_file(again / "pipeline" / "model" / "diffusion_pytorch_model.safetensors")
        names = [name for name in weights if name.startswith("backbone.network.")]
        assert len(names) > 50
        for name in names:
            torch.testing.assert_close(found[name], weights[name], rtol=0, atol=1e-6)
        written = load_config(again / "config.yaml")
        assert written.backbone.context_grid == 2 and written.scheduler.prediction_type == "epsilon"
        if place != first:
            continue
        with refused("backbone.pooled_grid", 4):
            resolve(parse_config({**tree, "backbone": {"initialize_from": str(place), "pooled_grid": 4}}), None)
