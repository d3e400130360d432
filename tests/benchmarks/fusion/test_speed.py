"""`mmdiff benchmark fusion-speed`: three ways to the same result, timed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from mmdiff.benchmarks.fusion.speed import compare_fusions, fusion_speed
from mmdiff.errors import InputError
from mmdiff.modalities.fusion import FUSIONS

Cli = Callable[..., Any]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", FUSIONS)
def test_the_three_ways_give_the_same(kind: str, backward: bool) -> None:
    found = fusion_speed(kind, sets=5, largest=4, dim=7, rounds=1, backward=backward)
    assert found.difference < 1e-5  # float32
    assert min(found[:3]) > 0


def test_the_command_shows_every_fusion(cli: Cli) -> None:
    answer = cli("benchmark", "fusion-speed", "--sets", 3, "--largest", 2, "--dim", 4, "--rounds", 1)
    assert answer.code == 0, answer.err
    assert "3 sets of 1 … 2 members of 4 numbers" in answer.out
    rows = re.findall(r"^(\w+)(, gradients)? +[\d.]+ ms +[\d.]+ ms +[\d.]+× ", answer.out, re.MULTILINE)
    assert rows == [(kind, end) for kind in FUSIONS for end in ("", ", gradients")]


def test_another_device_is_refused() -> None:
    with pytest.raises(InputError, match="--device = 'abacus'"):
        compare_fusions(device="abacus")
    with pytest.raises(InputError, match="--sets = 0"):
        compare_fusions(sets=0)
