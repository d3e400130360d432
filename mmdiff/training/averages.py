"""Which average of the weights a pipeline has; snapshots of power-function averages, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path

AVERAGE = "average.json"


def write_average(pipeline: Path, label: str, step: int, **facts: object) -> None:
    """Say in a pipeline folder which average its weights are."""
    (pipeline / AVERAGE).write_text(json.dumps({"average": label, "step": step, **facts}, indent=1) + "\n")
