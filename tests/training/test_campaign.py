"""The fault campaign, shortened; the whole one is `python tests/training/campaign.py CONFIG`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_nothing_is_lost_by_kills_and_damage(tiny_file: Path, tmp_path: Path) -> None:
    """In a process of its own, which forks: threads of this one would not be."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom campaign import campaign\n"
        "found = campaign(Path(sys.argv[2]), Path(sys.argv[3]), 4, 0, 3)\n"
        "assert found['kill', 'killed'] >= 2 and found['kill', 'resumed'] == 4, found\n"
        "assert found['damage', 'resumed'] == 3, found\n"
        "bad = [key for key in found if key[1] in ('traceback', 'differs', 'foreign') and found[key]]\n"
        "assert not bad, found\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tiny_file), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
