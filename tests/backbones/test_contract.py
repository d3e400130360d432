"""The contract of a backbone: one set of laws for all. A new backbone adds one entry to CASES."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from networks import DIFFUSERS_DIT, DIFFUSERS_UNET, DIT, alive
from networks import LAYERS as UNET
from torch import Tensor

from mmdiff.backbones import BACKBONES, Backbone, Observation
from mmdiff.slots import Axes, slots

OBSERVED, FLAGS = 3, 4  # observation channels, and state flags of two modalities
WIDTHS = (2, 2)  # of the flags


@dataclass(frozen=True)
class Case:
    kind: str
    space: tuple[int, int, int]
    settings: dict[str, Any]


CASES = [
    Case("unet", (1, 8, 8), UNET),
    Case("unet", (3, 4, 8), UNET),
    Case("unet", (1, 8, 8), {**UNET, "attention": [True, False], "layers_per_block": 2}),
    Case("unet", (2, 8, 8), {**UNET, "patch_size": 2}),
    Case("unet", (1, 8, 16), {**UNET, "pooled_grid": 2}),
    Case("unet", (3, 8, 8), {**UNET, "patch_size": 2, "input_skip": True}),
    Case("unet", (2, 8, 16), {**UNET, "patch_size": 2, "context_grid": 2}),
    Case("dit", (1, 8, 4), DIT),
    Case("dit", (2, 4, 8), {**DIT, "patch_size": 1, "registers": 0, "mlp": "swiglu", "value_residual": True}),
    Case("dit", (1, 8, 8), {**DIT, "depth": 3, "token_drop": 0.5, "outer_blocks": 1}),
    Case("dit", (3, 8, 8), {**DIT, "patch_size": 4, "decoder_depth": 1}),
    Case("diffusers_unet", (3, 8, 16), {"network": DIFFUSERS_UNET}),
    Case("diffusers_unet", (3, 8, 8), {"network": DIFFUSERS_UNET, "pooled_grid": 2, "context_grid": 2}),
    Case("diffusers_dit", (3, 8, 4), {"network": DIFFUSERS_DIT}),
]
Inputs = tuple[Tensor, Tensor, Observation]


def build(case: Case, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return alive(BACKBONES[case.kind](case.space, OBSERVED, WIDTHS, **case.settings), std=0.2)


def inputs(case: Case, count: int = 3) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(count, *case.space, generator=generator)
    channels = torch.randn(count, OBSERVED, *case.space[1:], generator=generator)
    flags = torch.randint(2, (count, FLAGS), generator=generator).float()
    flags[0] = 1.0
    random = build(case).random_numbers(*case.space[1:])
    numbers = torch.rand(count, random, generator=generator) if random else None
    return sample, torch.arange(count) * 7, Observation(channels, flags, numbers)


def part(batch: Inputs, rows: slice) -> Inputs:
    sample, timestep, observation = batch
    parts = (None if tensor is None else tensor[rows] for tensor in observation)
    return sample[rows], timestep[rows], Observation(*parts)


def test_every_kind_is_tested() -> None:
    assert {case.kind for case in CASES} == set(BACKBONES)


def test_shapes_are_those_that_widths_promise() -> None:
    for case in CASES:
        widths, (_, height, width) = BACKBONES[case.kind].widths(**case.settings), case.space
        output = build(case)(*inputs(case))
        assert output.prediction.shape == (3, *case.space)
        assert height % widths.stride == width % widths.stride == 0
        assert output.features.shape == (3, widths.features, height // widths.stride, width // widths.stride)
        assert output.pooled.shape == (3, widths.pooled)
        assert all(tensor.isfinite().all() for tensor in output)


def test_samples_do_not_see_one_another() -> None:
    for case in CASES:
        backbone, batch = build(case), inputs(case)
        parts = [backbone(*part(batch, rows)) for rows in (slice(0, 2), slice(2, 3))]
        for whole, *pieces in zip(backbone(*batch), *parts, strict=True):
            torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-4, atol=1e-5)


def test_every_input_matters_to_every_output() -> None:
    for case, changed in itertools.product(CASES, ["sample", "timestep", "channels", "flags"]):
        backbone, (sample, timestep, observation) = build(case), inputs(case)
        variants = {
            "sample": (sample + 1, timestep, observation),
            "timestep": (sample, timestep + 1, observation),
            "channels": (sample, timestep, observation._replace(channels=observation.channels + 1)),
            "flags": (sample, timestep, observation._replace(flags=1 - observation.flags)),
        }
        for before, after in zip(backbone(sample, timestep, observation), backbone(*variants[changed]), strict=True):
            assert not torch.allclose(before, after, rtol=1e-3, atol=1e-4)


def test_every_flag_and_every_channel_matters() -> None:
    for case in CASES:
        backbone, (sample, timestep, observation) = build(case), inputs(case)
        before = backbone(sample, timestep, observation).prediction
        for name, count in (("flags", FLAGS), ("channels", OBSERVED)):
            for index in range(count):
                changed = getattr(observation, name).clone()
                changed[:, index] += 1
                after = backbone(sample, timestep, observation._replace(**{name: changed})).prediction
                assert not torch.allclose(before, after, rtol=1e-3, atol=1e-4), (name, index)


def test_gradients_reach_every_parameter() -> None:
    for case in CASES:
        backbone = build(case)
        generator = torch.Generator().manual_seed(2)
        loss = sum((torch.randn(out.shape, generator=generator) * out).sum() for out in backbone(*inputs(case)))
        loss.backward()
        for name, parameter in backbone.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name  # 0 for keys' biases: softmax


def test_slots_name_every_layer_that_depends_on_the_modalities() -> None:
    for case in CASES:

        def made(observed: int, *widths: int) -> tuple[Backbone, dict[str, Axes]]:
            backbone = BACKBONES[case.kind](case.space, observed, widths, **case.settings)
            return backbone, backbone.slots(slots(range(observed)), slots(range(sum(widths))))

        (one, axes), (other, _) = made(OBSERVED, *WIDTHS), made(OBSERVED + 1, *WIDTHS, 2)
        state, larger = one.state_dict(), other.state_dict()
        assert {name for name in state if state[name].shape != larger[name].shape} == set(axes)
        for name, found in axes.items():
            pairs = enumerate(zip(state[name].shape, larger[name].shape, strict=True))
            assert {dim for dim, (small, large) in pairs if small != large} == set(found), name
        for name, found in axes.items():
            for dim, axis in found.items():
                assert len({slot.key for slot in axis.slots}) == len(axis.slots) == state[name].shape[dim]


def test_state_dict_carries_everything() -> None:
    for case in CASES:
        one, other, batch = build(case, seed=0), build(case, seed=1), inputs(case)
        assert not torch.equal(one(*batch).prediction, other(*batch).prediction)
        other.load_state_dict(one.state_dict(), strict=True)
        assert all(map(torch.equal, one(*batch), other(*batch)))


def test_double_precision_is_kept() -> None:
    for case in CASES:
        sample, timestep, observation = inputs(case)
        output = build(case).double()(sample.double(), timestep, observation.to(torch.float64))
        assert all(tensor.dtype == torch.float64 for tensor in output)


def test_blocks_compile_in_one_graph_each_and_compute_the_same() -> None:
    one_of_each = {case.kind: case for case in reversed(CASES)}.values()
    for case in [*one_of_each, *(case for case in CASES if {"value_residual", "token_drop"} & set(case.settings))]:
        torch.compiler.reset()
        backbone, batch = build(case), inputs(case)
        names, before = list(backbone.state_dict()), backbone(*batch)
        backbone.compile_blocks(backend="aot_eager")
        after = backbone(*batch)
        assert list(backbone.state_dict()) == names and backbone.blocks()
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
