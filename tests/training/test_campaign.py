"""The fault campaign, shortened; the whole one is `python tests/training/campaign.py CONFIG`."""

from __future__ import annotations

from pathlib import Path

import pytest
from campaign import main
from processes import Forked


@pytest.mark.slow
def test_nothing_is_lost_by_kills_and_damage(tiny_file: Path, tmp_path: Path) -> None:
    """In a process of its own, which forks: threads of this one would not be."""
    answer = Forked(main, (str(tiny_file), "--kills=4", "--full=0", "--damaged=3"), tmp_path / "log").wait(300)
    assert answer.code == 0, answer.err
    lines = [line.split() for line in answer.out.splitlines()]
    found = {(kind, outcome): int(count) for kind, outcome, count in lines}
    assert found["kill", "killed"] >= 2 and found["kill", "resumed"] == 4, found
    assert found["damage", "resumed"] == 3, found
    assert [key for key in found if key[1] in ("traceback", "hung", "differs", "foreign") and found[key]] == [], found
