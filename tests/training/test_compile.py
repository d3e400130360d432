"""`train.compile`: the same training, up to rounding, by code that a compiler made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import DIT
from safetensors.torch import load_file

from mmdiff.config import parse_config
from mmdiff.training import train

Tree = dict[str, Any]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler for a CPU")
def test_compiled_training_is_training(tiny: Tree, tmp_path: Path) -> None:
    """Two steps. The pipeline has the same names, and loads without a compiler."""
    graphs = torch._dynamo.utils.counters["stats"]
    tiny["backbone"], tiny["evaluate"] = {"kind": "dit", **DIT}, {"at_end": False}
    tiny["train"] |= {"steps": 2}
    weights = {}
    for compiled in (False, True):
        torch.compiler.reset()
        before = graphs["unique_graphs"]
        tiny["train"]["compile"], tiny["output"] = compiled, str(tmp_path / f"{compiled}")
        folder = train(parse_config(tiny), progress=False)
        assert (graphs["unique_graphs"] > before) == compiled
        weights[compiled] = load_file(folder / "pipeline" / "model" / "diffusion_pytorch_model.safetensors")
    assert weights[True].keys() == weights[False].keys()
    for name, tensor in weights[False].items():
        torch.testing.assert_close(weights[True][name], tensor, rtol=1e-2, atol=2e-3)
