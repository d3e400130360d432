"""How the global batch is split, over parts or processes, changes nothing but rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from processes import assert_close, lines

from mmdiff.config import Config, TrainConfig, load_config
from mmdiff.errors import InputError
from mmdiff.training import train
from mmdiff.training.process import make_accelerator


def test_a_process_that_knows_nothing_of_the_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    make_accelerator(TrainConfig())  # alone, and from now on Accelerate believes that it is
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"^WORLD_SIZE = 2: but Accelerate sees 1 process; .*torchrun"):
        make_accelerator(TrainConfig())


@pytest.mark.parametrize(("batch_size", "accumulate"), [(10, 3), (4, 8)])
def test_a_batch_that_cannot_be_split_is_refused(
    configure: Callable[..., Config], batch_size: int, accumulate: int, tmp_path: Path
) -> None:
    config = configure(f"train.batch_size={batch_size}", f"train.accumulate={accumulate}")
    with pytest.raises(InputError, match=rf"^train.batch_size = {batch_size}: .* train.accumulate = {accumulate}$"):
        train(config)
    assert not (tmp_path / "run").exists()


ALL_MODALITIES = {
    "data": {
        "source": "shapes",
        "options": {"rows": 60, "validation_rows": 4, "size": 16},
        "masking": {"masked": {"pattern": "squares", "ratio": [0.2, 0.6]}},
        "missing": {"image": 0.2, "mask": 0.3, "masked": 0.3, "label": 0.3, "embedding": 0.3, "caption": 0.3},
    },
    "modalities": {
        "image": {"kind": "image"},
        "mask": {"kind": "mask"},
        "masked": {"kind": "masked_image"},
        "label": {"kind": "label", "weight": {"schedule": "learned"}},
        "embedding": {"kind": "embedding"},
        "caption": {"kind": "text", "dim": 16},
    },
    "states": {"anchor_hidden": 0.1},
    "loss": {"uncertainty": True},
}


def test_two_processes_compute_what_one_computes_whatever_is_missing_in_all_modalities(
    tiny: dict[str, Any], forked: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "all.yaml"
    OmegaConf.save(OmegaConf.create({**tiny, **ALL_MODALITIES}), path)
    two = forked(["train", path, f"output={tmp_path / 'two'}"], tmp_path / "log", processes=2)
    one = train(load_config(path, [f"output={tmp_path / 'one'}"]))
    answer = two.wait()
    assert answer.code == 0, answer.err
    state = json.loads((tmp_path / "two" / "checkpoints" / "step-6" / "state.json").read_text())
    assert state["processes"] == 2
    assert {"l2/mask", "l2/masked", "l2/label", "l2/embedding", "l2/caption"} < set(lines(one, 1)[0])
    assert_close(tmp_path / "two", one)
