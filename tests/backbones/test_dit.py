"""Laws of the transformer: places by differences alone, absent values unseen, patches dropped by number, any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import DIT, alive
from refusals import refused
from torch import Tensor

from mmdiff.backbones import DiT, Observation
from mmdiff.backbones.transformer import Rotation, rotated

SPACE, OBSERVED, WIDTHS = (2, 8, 8), 1, (2, 5)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "values": {"value_residual": True, "depth": 3},
    "swiglu": {"mlp": "swiglu"},
    "dropping": {"token_drop": 0.75, "outer_blocks": 1, "depth": 4, "value_residual": True},
    "decoder": {"decoder_depth": 1},
}
every_option = pytest.mark.parametrize("option", OPTIONS)


def dit(seed: int = 0, fresh: bool = False, **settings: Any) -> DiT:
    torch.manual_seed(seed)
    backbone = DiT(SPACE, OBSERVED, WIDTHS, **{**DIT, **settings}).double()
    return backbone if fresh else alive(backbone, std=0.2)


def inputs(count: int = 3, size: tuple[int, int] = SPACE[1:], random: int = 0) -> tuple[Tensor, Tensor, Observation]:
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    sample = torch.randn(count, SPACE[0], *size, **draw)
    seen, flags = torch.randn(count, OBSERVED, *size, **draw), torch.rand(count, sum(WIDTHS), **draw)
    numbers = torch.rand(count, random, **draw) if random else None
    return sample, torch.arange(count) * 300, Observation(seen, flags, numbers)


def same(one: Any, other: Any, **tolerance: float) -> None:
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, **tolerance)


def test_a_product_of_query_and_key_depends_on_the_difference_of_places() -> None:
    rows, columns = 5, 7
    turn = Rotation(16, unplaced=1).double()(rows, columns, torch.float64)
    pair = torch.randn(1, 1, 2, 1, 16, dtype=torch.float64).expand(1, 1 + rows * columns, 2, 1, 16)
    query, key = rotated(pair, turn)[0, :, :, 0].unbind(1)
    products = (query @ key.T)[1:, 1:].reshape(rows, columns, rows, columns)
    torch.testing.assert_close(products[:-1, :-1, :-1, :-1], products[1:, 1:, 1:, 1:])
    assert not torch.allclose(products[0, 0], products[1, 0])  # places matter
    torch.testing.assert_close(query.norm(dim=1), pair[0, :, 0, 0].norm(dim=1))  # turns keep lengths
    torch.testing.assert_close(query[0], pair[0, 0, 0, 0])  # without a place nothing turns


@every_option
def test_a_fresh_network_predicts_zero_and_its_blocks_are_the_identity(option: str) -> None:
    backbone = dit(fresh=True, **OPTIONS[option])
    assert not backbone(*inputs()).prediction.any()
    tokens = torch.randn(2, 6, 16, dtype=torch.float64)
    turn = backbone.rotation(1, 6 - backbone.unplaced, torch.float64)
    after, _ = backbone.layers[-1](tokens, torch.randn(2, 1, 16, dtype=torch.float64), turn)
    assert torch.equal(after, tokens)


def test_an_absent_value_is_not_seen() -> None:
    """Zeros of flags and context leave the token's name alone, whatever the layers have learned."""
    backbone, (sample, timestep, observation) = dit(), inputs()
    flags = observation.flags.clone()
    flags[:, 2:] = 0.0
    before = backbone(sample, timestep, observation._replace(flags=flags))
    backbone.flags[0].weight.data[:, 2:] += 1.0
    same(backbone(sample, timestep, observation._replace(flags=flags)), before, rtol=0, atol=0)


def test_a_modality_is_told_by_its_own_token_too() -> None:
    """Without the conditioning the flags still reach the prediction, through attention."""
    backbone, (sample, timestep, observation) = dit(), inputs()
    for block in [*backbone.layers, backbone]:
        block.modulation.weight.data.zero_()
    changed = observation._replace(flags=observation.flags + torch.eye(sum(WIDTHS), dtype=torch.float64)[3])
    before, after = (backbone(sample, timestep, told).prediction for told in (observation, changed))
    assert not torch.allclose(before, after, rtol=1e-6)


@every_option
def test_any_size_that_the_patch_divides(option: str) -> None:
    backbone = dit(**OPTIONS[option])
    for size in ((4, 16), (2, 2), (12, 10)):
        assert backbone(*inputs(size=size)).prediction.shape[2:] == size


def test_dropped_patches_are_those_with_the_largest_numbers_and_only_where_numbers_are_given() -> None:
    backbone = dit(**OPTIONS["dropping"])
    patches = backbone.random_numbers(*SPACE[1:])
    assert patches == 16 and dit().random_numbers(8, 8) == 0
    sample, timestep, observation = inputs(random=patches)
    whole = backbone(sample, timestep, observation._replace(random=None))
    part = backbone(sample, timestep, observation)
    assert not torch.allclose(whole.prediction, part.prediction)
    order = observation._replace(random=observation.random**3)  # the same order, so the same patches
    same(backbone(sample, timestep, order), part, rtol=0, atol=0)
    row = slice(1, 2)  # a sample's patches are its own
    alone = backbone(sample[row], timestep[row], Observation(*(tensor[row] for tensor in observation)))
    same(alone, [tensor[row] for tensor in part])


@torch.no_grad()
def test_the_middle_blocks_see_the_kept_patches_and_all_other_tokens() -> None:
    """The four patches of the smallest numbers, each at its own place."""
    backbone, seen = dit(**OPTIONS["dropping"]), []
    for block in backbone.layers:
        block.register_forward_pre_hook(lambda _, arguments: seen.append((arguments[0], arguments[2])))
        block.register_forward_hook(lambda *call: seen.append(call[2][0]))
    batch = inputs(random=16)
    backbone(*batch)
    front = len(WIDTHS) + 1
    before, ((tokens, turn), *_) = seen[1], seen[2:]
    whole = backbone.rotation(4, 4, torch.float64)[0]
    for row, numbers in enumerate(batch[2].random):
        kept = [*range(front), *(int(k) + front for k in numbers.argsort()[:4])]
        assert torch.equal(tokens[row], before[row, kept]) and torch.equal(turn[row], whole[kept])
    assert [len(entry[0][0]) for entry in seen[::2]] == [front + 16, front + 4, front + 4, front + 16]


@every_option
def test_checkpointing_changes_no_gradient_and_keeps_autocast(option: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = dit(gradient_checkpointing=checkpointing, **OPTIONS[option]).float()
        sample, timestep, observation = inputs(random=16)
        dtypes: list[torch.dtype] = []
        backbone.layers[0].mlp.down.register_forward_hook(lambda *call, seen=dtypes: seen.append(call[2].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            output = backbone(sample.float(), timestep, Observation(*(part.float() for part in observation)))
            loss = output.prediction.float().square().sum() + output.pooled.float().sum()
        loss.backward()
        assert dtypes == [torch.bfloat16] * (1 + checkpointing)  # the second one is recomputed
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    same(*gradients, rtol=0, atol=0)


def test_presets_are_the_published_sizes() -> None:
    """Parameters of DiT-S, B, L and XL without embeddings of classes: 33, 130, 458 and 675 million."""
    for preset, millions in {"S": 33, "B": 130, "L": 458, "XL": 675}.items():
        with torch.device("meta"):
            backbone = DiT((4, 32, 32), 0, (2,), preset=preset)
        count = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
        assert abs(count - millions) < 0.02 * millions


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("preset", "H"),
        ("depth", 0),
        ("width", 10**9),
        ("heads", 3),
        ("heads", 8),
        ("patch_size", 3),
        ("patch_size", 0),
        ("registers", -1),
        ("mlp", "relu"),
        ("mlp_ratio", 0.0),
        ("token_drop", 1.0),
        ("decoder_depth", -1),
    ],
)
def test_impossible_settings_are_refused(key: str, value: Any) -> None:
    with refused(f"backbone.{key}", value):
        dit(**{key: value})


def test_dropping_needs_a_middle() -> None:
    with refused("backbone.outer_blocks", 1):
        dit(token_drop=0.5, outer_blocks=1)
    with refused("backbone.decoder_width", 12):
        dit(decoder_depth=1, decoder_width=12)
