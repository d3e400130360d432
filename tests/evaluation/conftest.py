"""Shared by the tests of scores: a perceptual backbone that needs no download."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import squeezenet1_1


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SqueezeNet 1.1 with torchvision's names: LPIPS needs nothing else."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mine.pth"
    torch.save(squeezenet1_1(weights=None).state_dict(), path)
    return path
