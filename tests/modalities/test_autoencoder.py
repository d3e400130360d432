"""Latents of every autoencoder that diffusers has for images: as diffusers makes them, at unit scale, and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from networks import LAYERS
from refusals import refused
from torch import Generator, Tensor

from mmdiff.build import build
from mmdiff.config import parse_config
from mmdiff.modalities import Image, Shape
from mmdiff.modalities import autoencoder as latents
from mmdiff.model import MTDiffusionModel
from mmdiff.objective import BatchPosition
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.schedulers import MTDiffusionScheduler
from mmdiff.training import train

SIZE = 32
_KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
}
_CAUSAL = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
_CAUSAL |= {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [2.0, 1.0, 0.5, 1.5]}
_DC = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in {
    "block_types": ("ResBlock", "EfficientViTBlock"),
    "block_out_channels": (8, 8),
    "layers_per_block": (1, 1),
    "qkv_multiscales": ((), (5,)),
}.items()}  # fmt: skip
#: {class: its smallest settings}
TINY: dict[str, dict[str, Any]] = {
    "AsymmetricAutoencoderKL": {
        "down_block_types": _KL["down_block_types"],
        "up_block_types": _KL["up_block_types"],
        "down_block_out_channels": (8, 8),
        "up_block_out_channels": (8, 8),
        "norm_num_groups": 4,
    },
    "AutoencoderDC": {**_DC, "latent_channels": 4, "attention_head_dim": 2, "scaling_factor": 0.4},
    "AutoencoderKL": {**_KL, "scaling_factor": 0.7, "shift_factor": 0.3},
    "AutoencoderKLFlux2": {**_KL, "latent_channels": 4, "layers_per_block": 1},
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "spatial_compression_ratio": 2,
        "sample_size": SIZE,
        "scaling_factor": 0.75,
    },
    "AutoencoderKLHunyuanImageRefiner": {
        "latent_channels": 4,
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "spatial_compression_ratio": 2,
        "temporal_compression_ratio": 1,
    },
    "AutoencoderKLKVAE": {
        "channels": 32,
        "num_enc_blocks": 1,
        "num_dec_blocks": 1,
        "z_channels": 4,
        "ch_mult": (1, 1),
    },
    "AutoencoderKLQwenImage": _CAUSAL,
    "AutoencoderKLQwenImage21": {**_CAUSAL, "decoder_base_dim": 8},
    "AutoencoderRAE": {
        "encoder_type": "mae",
        "encoder_hidden_size": 64,
        "encoder_patch_size": 8,
        "encoder_num_hidden_layers": 1,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
        "patch_size": 8,
        "encoder_input_size": SIZE,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    },
    "ConsistencyDecoderVAE": {
        "encoder_block_out_channels": (8, 8),
        "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
        "encoder_norm_num_groups": 4,
        "encoder_layers_per_block": 1,
        "decoder_block_out_channels": (8, 8),
        "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "decoder_norm_num_groups": 4,
        "decoder_layers_per_block": 1,
    },
    "VQModel": {**_KL, "num_vq_embeddings": 16},
}
UNSCALED = {"AutoencoderKLFlux2", "AutoencoderKLKVAE", "AutoencoderRAE"}


def network(name: str = "AutoencoderKL") -> Any:
    torch.manual_seed(0)
    return getattr(diffusers, name)(**TINY[name]).eval()


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=Generator().manual_seed(0)) * 2 - 1


def own(net: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    """(latents, images) as diffusers' own calls make them."""
    frames, unit = "Qwen" in type(net).__name__ or "Refiner" in type(net).__name__, "RAE" in type(net).__name__
    x = (value + 1) / 2 if unit else value
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if "21" in type(net).__name__ else x
    output = net.encode(x.unsqueeze(2) if frames else x)
    z = output.latent_dist.mode() if "latent_dist" in output else output[0]
    noise = [Generator().manual_seed(0) for _ in value] if "Consistency" in type(net).__name__ else None
    y = net.decode(z, **({"generator": noise} if noise else {})).sample
    z, y = (z.squeeze(2), y.squeeze(2)) if frames else (z, y)
    return z, (y * 2 - 1 if unit else y)[:, :3]


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_latents_are_diffusers_own_and_a_pipeline_keeps_the_class(name: str, tmp_path: Path) -> None:
    net = network(name)
    net.save_pretrained(tmp_path / "autoencoder")
    source = str(tmp_path / "autoencoder")
    found = Image.settings_from_files(space="latent", autoencoder=source)
    assert ("latent_scale" in found) == (name in UNSCALED)
    scales = {n: [v] * found["latent_channels"] for n, v in (("latents_mean", 0.25), ("latents_std", 2.0))}
    settings = {"size": SIZE, "channels": 3, "space": "latent", "autoencoder": source, **found}
    settings |= scales if name in UNSCALED else {}
    model = MTDiffusionModel({"image": {"kind": "image", **settings}}, dict(LAYERS, kind="unet"))
    anchor, (z, y) = model.modalities["image"], own(net, images())
    assert z.shape == (3, *model.space)
    shift, factor = (torch.as_tensor(part) for part in anchor._scale())
    encoded = anchor.encode(images())
    torch.testing.assert_close(encoded, (z - shift) * factor)
    torch.testing.assert_close(anchor.unencode(encoded), y, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(anchor.unencode(encoded[1:2]), anchor.unencode(encoded)[1:2], rtol=1e-4, atol=1e-4)
    MTDiffusionPipeline(model.eval(), MTDiffusionScheduler(num_train_timesteps=20)).save_pretrained(tmp_path / "pipe")
    loaded = MTDiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert type(loaded.autoencoder) is type(net)
    assert torch.equal(loaded.model.modalities["image"].encode(images()), encoded)


def test_the_families_are_classes_of_diffusers_that_the_test_knows() -> None:
    assert set(TINY) == set(latents.FAMILIES)


def config(folder: Path, autoencoder: str = "AutoencoderKL", **image: Any) -> Any:
    network(autoencoder).save_pretrained(folder / "autoencoder")
    image |= {"kind": "image", "space": "latent", "autoencoder": str(folder / "autoencoder")}
    return parse_config({
        "name": "latent",
        "output": str(folder / "run"),
        "data": {"source": "shapes", "options": {"rows": 24, "validation_rows": 4, "size": SIZE}},
        "modalities": {"image": image},
        "backbone": dict(LAYERS),
        "scheduler": {"num_train_timesteps": 50},
        "train": {"steps": 2, "batch_size": 6, "threads": 1},
        "sample": {"steps": 2},
        "evaluate": {"at_end": False},
    })  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"latent_scale": "measured"}], ids=["no scale in the config", "asked for"])
def test_measured_latents_have_unit_scale_and_the_run_keeps_the_numbers(tmp_path: Path, settings: dict) -> None:
    asked = config(tmp_path, "AutoencoderKL" if settings else "AutoencoderKLFlux2", **settings)
    experiment = build(asked)
    encoded = experiment.model.modalities["image"].encode(experiment.train.all().values["image"])
    torch.testing.assert_close(encoded.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(encoded.square().mean(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    one = train(asked)
    pipe = MTDiffusionPipeline.from_pretrained(one / "pipeline")
    numbers = experiment.config.modalities["image"].settings()["latents_std"]
    assert pipe.model.config.modality_config["image"]["latents_std"] == numbers
    text = (one / "config.yaml").read_text()  # as another machine has rounded it
    (one / "config.yaml").write_text(text.replace(str(numbers[0]), str(numbers[0] * 1.001)))
    longer = {"train": asked.train.model_copy(update={"steps": 3, "resume": "auto"})}
    lines = (train(asked.model_copy(update=longer)) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 3


def drawn(experiment: Any, step: int, rows: slice) -> Tensor:
    """The latents of a step's rows."""
    positions = torch.arange(6)[rows]
    anchor, value = experiment.model.modalities["image"], images(6)[rows]
    anchor.prepare(value, experiment.objective.normals("latent", BatchPosition(step, positions, 6)))
    return anchor.encode(value)


def test_a_draw_is_a_function_of_step_and_position_with_the_posteriors_moments(tmp_path: Path) -> None:
    experiment = build(config(tmp_path, latent_draw=True))
    anchor = experiment.model.modalities["image"]
    mode, posterior = anchor.encode(images(6)), anchor.posterior(images(6))
    draws = torch.stack([drawn(experiment, step, slice(0, 6)) for step in range(400)])
    assert torch.equal(draws[7], drawn(experiment, 7, slice(0, 6))) and not torch.equal(draws[7], draws[8])
    torch.testing.assert_close(drawn(experiment, 7, slice(2, 4)), draws[7, 2:4], rtol=1e-4, atol=1e-5)
    std = torch.exp(0.5 * posterior.logvar) * 0.7
    torch.testing.assert_close((draws.mean(dim=0) - mode).square().mean(), std.square().mean() / 400, rtol=0.1, atol=0)
    torch.testing.assert_close(draws.var(dim=0).mean(), std.square().mean(), rtol=0.05, atol=0)


def _of_class(name: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "autoencoder" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": name}))

    return change


def _nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "settings", "key"),
    [
        (_of_class("AutoencoderKLWan"), {}, "autoencoder"),
        (_of_class("AutoencoderOobleck"), {}, "autoencoder"),
        (_of_class("UNet2DModel"), {}, "autoencoder"),
        (_of_class(None), {}, "autoencoder"),
        (_of_class("AutoencoderTiny"), {}, "autoencoder"),  # its weights are not there
        (_nothing, {"latents_mean": [0.0]}, "latents_mean"),
        (_nothing, {"latents_std": [1.0, 1.0, 1.0, 0.0], "latents_mean": [0.0] * 4}, "latents_std"),
        (_nothing, {"latent_scale": "guess"}, "latent_scale"),
    ],
)
def test_what_cannot_encode_images_is_refused(tmp_path: Path, change: Any, settings: dict, key: str) -> None:
    asked = config(tmp_path, **settings)
    change(tmp_path)
    with refused(f"modalities.image.{key}"):
        train(asked)


def test_images_of_other_channels_or_size_are_refused() -> None:
    for name, shape, key in (("AutoencoderKL", (1, SIZE), "channels"), ("AutoencoderRAE", (3, 64), "size")):
        anchor = Image(Shape((4, 16, 16), 1, 1), *shape, space="latent", head=False)
        with refused(key):
            anchor.attach(network(name))
