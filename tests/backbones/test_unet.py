"""The U-Net is diffusers' own where nothing is observed, and refuses what cannot be built."""

from __future__ import annotations

import itertools
from typing import Any
from unittest.mock import ANY

import torch
from networks import LAYERS as TINY
from refusals import refused

from mmdiff.backbones import Observation, UNet

SPACE, OBSERVED, FLAGS = (1, 8, 8), 2, 4


def unet(**settings: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(SPACE, OBSERVED, (2, FLAGS - 2), **{**TINY, **settings}).eval()


def observation(count: int) -> Observation:
    return Observation(torch.zeros(count, OBSERVED, *SPACE[1:]), torch.zeros(count, FLAGS))


@torch.no_grad()
def test_without_flags_it_is_diffusers_forward_bit_for_bit() -> None:
    for layers_per_block, attention in itertools.product([1, 2], [None, [True, False], [False, False]]):
        backbone = unet(attention=attention, layers_per_block=layers_per_block)
        torch.nn.init.normal_(backbone.unet.conv_out.weight)
        sample, timestep = torch.randn(3, *SPACE), torch.tensor([0, 5, 999])
        for channels in (torch.zeros(3, OBSERVED, 8, 8), torch.randn(3, OBSERVED, 8, 8)):
            prediction = backbone(sample, timestep, observation(3)._replace(channels=channels)).prediction
            assert prediction.abs().max() > 0.1  # of random weights: not the fresh network's zero
            assert torch.equal(prediction, backbone.unet(torch.cat([sample, channels], dim=1), timestep).sample)


@torch.no_grad()
def test_without_observation_weights_channels_and_flags_are_not_seen() -> None:
    backbone = unet()
    torch.nn.init.normal_(backbone.unet.conv_out.weight)
    backbone.unet.conv_in.weight[:, SPACE[0] :] = 0
    backbone.flags[-1].weight.zero_()
    sample, timestep = torch.randn(3, *SPACE), torch.arange(3)
    seen = backbone(sample, timestep, Observation(torch.randn(3, OBSERVED, 8, 8), torch.ones(3, FLAGS)))
    assert all(map(torch.equal, seen, backbone(sample, timestep, observation(3))))


def test_a_fresh_network_predicts_zero() -> None:
    for patch_size in [1, 2]:
        output = unet(patch_size=patch_size)(torch.randn(2, *SPACE), torch.arange(2), observation(2))
        assert not output.prediction.any()
        assert output.features.any()


@torch.no_grad()
def test_patches_are_diffusers_forward_on_unshuffled_pixels() -> None:
    """Channel 4·c + 2·i + j of a position holds channel c of pixel (i, j) of its 2×2 patch."""
    backbone = unet(patch_size=2)
    torch.nn.init.normal_(backbone.unet.conv_out.weight)
    sample, timestep = torch.randn(2, *SPACE), torch.arange(2)
    x = torch.cat([sample, observation(2).channels], dim=1)
    patches = torch.stack([x[:, c, i::2, j::2] for c in range(3) for i in range(2) for j in range(2)], dim=1)
    expected = backbone.unet(patches, timestep).sample
    actual = backbone(sample, timestep, observation(2)).prediction[:, 0]
    for k, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        assert torch.equal(actual[:, i::2, j::2], expected[:, k])


def test_widths_follow_the_levels() -> None:
    """Features have the finest level's 8 channels, one position per patch; pooled is 16 + 8 wide."""
    for patch_size, expected in [(1, (8, 24, 1)), (2, (8, 24, 2))]:
        assert UNet.widths(**TINY, patch_size=patch_size) == expected


IMPOSSIBLE = [  # the key, its value, and what the line names beside them
    ((1, 6, 8), {"block_out_channels": [8, 8, 8]}, "block_out_channels", [8, 8, 8], "4", "(6, 8)"),
    ((1, 8, 6), {"block_out_channels": [8, 8, 8]}, "block_out_channels", [8, 8, 8], "4", "(8, 6)"),
    ((1, 6, 6), {"patch_size": 2}, "block_out_channels", [8, 16], "4", "(6, 6)"),
    (SPACE, {"attention": [True]}, "attention", [True], "2"),
    (SPACE, {"block_out_channels": [8, 18]}, "block_out_channels", ANY, "norm_num_groups = 4"),
    (SPACE, {"block_out_channels": [8, 12]}, "block_out_channels", ANY, "attention_head_dim = 8"),
    (
        SPACE,
        {"block_out_channels": [12, 16], "attention": [True, True]},
        "block_out_channels",
        ANY,
        "attention_head_dim",
    ),
    (SPACE, {"block_out_channels": [8, 12], "attention": [False] * 2}, "block_out_channels", ANY, "attention_head"),
    (SPACE, {"patch_size": 3}, "patch_size", 3, "block_out_channels[0] = 8"),
    (SPACE, {"patch_size": 0}, "patch_size", 0),
    (SPACE, {"context_grid": 3}, "context_grid", 3),
    (SPACE, {"context_grid": -1}, "context_grid", -1),
]


def test_impossible_settings_are_refused() -> None:
    for space, settings, key, value, *facts in IMPOSSIBLE:
        with refused(f"backbone.{key}", value, *facts):
            UNet(space, OBSERVED, (2, FLAGS - 2), **{**TINY, **settings})


@torch.no_grad()
def test_with_a_context_grid_a_vector_can_say_where_and_no_vector_says_nothing() -> None:
    backbone = unet(context_grid=2)
    nothing, told = (backbone.place(flags) for flags in (torch.zeros(1, FLAGS), torch.eye(FLAGS)[:1]))
    assert nothing.shape == (1, 8, 2, 2) and not nothing.any()
    assert len(told[0, 0].unique()) == 4
