"""A network of diffusers inside a backbone predicts what it predicts alone, bit by bit, whatever is observed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from networks import DIFFUSERS_DIT as DIT
from networks import DIFFUSERS_UNET as UNET
from networks import alive
from refusals import refused
from torch import Tensor

from mmdiff.backbones import BACKBONES, NetworkBackbone, Observation, complete_config

RESNET = {"down_block_types": ["ResnetDownsampleBlock2D"] * 2, "up_block_types": ["ResnetUpsampleBlock2D"] * 2}
SKIP = {"down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"]}
SKIP |= {"up_block_types": ["AttnSkipUpBlock2D", "SkipUpBlock2D"], "block_out_channels": [32, 32]}
UNETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ddpm": {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6},
    "centred": {"center_input_sample": True, "act_fn": "gelu", "mid_block_scale_factor": 1.5},
    "no head size": {"attention_head_dim": None, "resnet_time_scale_shift": "scale_shift"},
    "group norm in the middle": {"attn_norm_num_groups": 2, "time_embedding_dim": 24, "dropout": 0.3},
    "learned variance": {"out_channels": 6},
    "one channel": {"in_channels": 1, "out_channels": 1},
    "no middle": {"mid_block_type": None},
    "no attention in the middle": {"add_attention": False},
    "resnets that resample": {**RESNET, "downsample_type": "resnet", "upsample_type": "resnet"},
    "attention blocks with resnets": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "skip blocks, fourier (NCSN++)": {**SKIP, "time_embedding_type": "fourier"},
    "learned times": {"time_embedding_type": "learned", "num_train_timesteps": 20},
    "classes": {"num_class_embeds": 5},
    "classes as times": {"class_embed_type": "timestep"},
    "embeddings as classes": {"class_embed_type": "identity"},
}
CASES = [
    *(pytest.param("diffusers_unet", {**UNET, **settings}, id=name) for name, settings in UNETS.items()),
    pytest.param("diffusers_dit", DIT, id="dit"),
    pytest.param("diffusers_dit", {**DIT, "out_channels": 6, "patch_size": 4}, id="dit, learned variance"),
    pytest.param("diffusers_dit", {**DIT, "attention_bias": False, "norm_elementwise_affine": True}, id="dit, affine"),
]
OBSERVED, FLAGS = 2, 5


def made(kind: str, config: dict[str, Any], size: tuple[int, int] = (8, 8), **settings: Any) -> NetworkBackbone:
    torch.manual_seed(0)
    cls = BACKBONES[kind]
    takes_class = config.get("num_class_embeds") or config.get("class_embed_type") == "timestep"
    settings = {**({"class_label": 3} if takes_class else {}), **settings}
    space = (config.get("in_channels", 3), *size)
    backbone = cls(space, OBSERVED, (2, FLAGS - 2), network=complete_config(cls.network_class, config), **settings)
    alive(backbone.network)
    return backbone.eval()


def inputs(backbone: NetworkBackbone, size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Observation]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(3, backbone.channels, *size, generator=generator, dtype=dtype)
    seen = torch.randn(3, OBSERVED, *size, generator=generator, dtype=dtype)
    return sample, torch.tensor([1, 7, 19]), Observation(seen, torch.randn(3, FLAGS, generator=generator, dtype=dtype))


def alone(backbone: NetworkBackbone, sample: Tensor, timestep: Tensor, label: int | None = None) -> Tensor:
    """The network's own forward, at the class that stands for all."""
    network, classes = backbone.network, backbone.label
    labels = None if classes is None else classes.expand(len(sample))
    if network.config.get("class_embed_type") == "identity":
        labels = sample.new_zeros(len(sample), network.time_embedding.linear_2.out_features)
    return network(sample, timestep, class_labels=labels).sample[:, : backbone.channels]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "config"), CASES)
def test_the_first_prediction_is_the_networks_own(kind: str, config: dict[str, Any]) -> None:
    grids = [{}, {"context_grid": 2, "pooled_grid": 2}] if kind == "diffusers_unet" else [{}]
    for settings in grids:
        backbone = made(kind, config, **settings)
        sample, timestep, observation = inputs(backbone, (8, 8), torch.float32)
        prediction = backbone(sample, timestep, observation).prediction
        assert prediction.abs().max() > 1e-3 and torch.equal(prediction, alone(backbone, sample, timestep))


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (8, 16)])
def test_another_size_than_the_networks_own(size: tuple[int, int]) -> None:
    for kind, config in (("diffusers_unet", UNET), ("diffusers_dit", DIT)):
        backbone = made(kind, config, size)
        sample, timestep, observation = inputs(backbone, size, torch.float64)
        prediction = backbone.double()(sample, timestep, observation).prediction
        if kind == "diffusers_unet" or size[0] == size[1]:  # diffusers' DiT unpatchifies squares only
            assert torch.equal(prediction, alone(backbone, sample, timestep))
        assert prediction.shape == sample.shape and prediction.dtype == torch.float64


def test_what_is_added_learns_from_the_first_step() -> None:
    for kind, config in (("diffusers_unet", UNET), ("diffusers_dit", DIT)):
        backbone = made(kind, config)
        sample, timestep, observation = inputs(backbone, (8, 8), torch.float32)
        backbone(sample, timestep, observation).prediction.square().sum().backward()
        assert backbone.observe.weight.grad.flatten(2).any(dim=2).all() and backbone.flags[2].weight.grad.any()


CROSS = ["CrossAttnDownBlock2D"] * 2
REFUSED = {
    "in_channels": ("unet", {"in_channels": 4}, {}, "network.in_channels"),
    "out_channels": ("dit", {"out_channels": 4}, {}, "network.out_channels"),
    "quantized": ("dit", {"quantization_config": {"a": 1}}, {}, "network.quantization_config"),
    "huge": ("unet", {"block_out_channels": [10**9, 8]}, {}, "network.block_out_channels.0"),
    "blocks": ("unet", {"down_block_types": ["os.system"] * 2}, {}, "network"),
    "cross attention": ("unet", {"down_block_types": CROSS}, {}, "network"),
    "a word for a number": ("dit", {"num_layers": "many"}, {}, "network"),
    "norm": ("dit", {"norm_type": "layer_norm"}, {}, "network"),
    "no class": ("unet", {"num_class_embeds": 5}, {"class_label": None}, "class_label"),
    "class beyond": ("unet", {"num_class_embeds": 5}, {"class_label": 5}, "class_label"),
    "class of none": ("unet", {}, {"class_label": 1}, "class_label"),
    "class of a DiT": ("dit", {}, {"class_label": 11}, "class_label"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_one_line(case: str) -> None:
    kind, changed, settings, key = REFUSED[case]
    network = {**{"unet": UNET, "dit": DIT}[kind], **changed}
    with refused(f"backbone.{key}"):
        BACKBONES[f"diffusers_{kind}"]((3, 8, 8), OBSERVED, (2, FLAGS - 2), network=network, **settings)


def test_sizes_that_the_levels_or_patches_do_not_divide_are_refused() -> None:
    for kind, config, size in (("diffusers_unet", UNET, (9, 8)), ("diffusers_dit", DIT, (8, 7))):
        with refused("backbone.network" + (".patch_size" if kind == "diffusers_dit" else "")):
            made(kind, config, size)


def test_a_complete_config_builds_the_same_network_again() -> None:
    for cls, config in ((UNet2DModel, UNET), (DiTTransformer2DModel, DIT)):
        complete = json.loads(json.dumps(complete_config(cls, cls(**config).config)))  # as `config.json` has it
        assert complete == complete_config(cls, config) == complete_config(cls, cls(**complete).config)
