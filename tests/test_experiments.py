"""Every shipped experiment can be read, and trains at toy size where its data are embedded."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdiff.config import load_config, parse_config
from mmdiff.data.sources import EMBEDDED
from mmdiff.training import train

EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))
TOY = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "patch_size": 2,
}
each_experiment = pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)


def test_there_are_experiments() -> None:
    assert "digits" in {path.stem for path in EXPERIMENTS}


@each_experiment
def test_it_is_read_and_named_after_its_file(path: Path) -> None:
    assert load_config(path).name == path.stem


@each_experiment
def test_it_trains_at_toy_size(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    if config.data.source not in EMBEDDED:
        pytest.skip(f"its data are not embedded: {config.data.source}")
    tree = config.model_dump()
    if config.backbone.kind == "unet":
        tree["backbone"] |= TOY
    tree["train"] |= {"steps": 2, "batch_size": 4 * config.train.accumulate, "threads": 1}
    tree |= {"output": str(tmp_path / "run"), "track": "none", "sample": {**tree["sample"], "steps": 1}}
    folder = train(parse_config(tree))
    assert (folder / "pipeline" / "model_index.json").is_file()
