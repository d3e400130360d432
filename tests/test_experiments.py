"""Every shipped experiment is read, steps on stand-in data at toy size, and trains where its data are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmdiff.build import build_model
from mmdiff.config import Config, first_difference, load_config, parse_config
from mmdiff.data.sources import EMBEDDED
from mmdiff.resolve import needs_data, resolve
from mmdiff.training import train
from mmdiff.training.dry_run import dry_run

ROOT = Path(__file__).parents[1]
# others are of `mmdiff benchmark fusion`: tests/benchmarks/fusion
EXPERIMENTS = sorted(path for path in (ROOT / "experiments").rglob("*.yaml") if "\nmodalities:" in path.read_text())
RESTORATION = ("multitask", "reconstruct", "unconditional", "conditional")
DATA = ROOT.parent / "shared" / "data"
TOY = {
    "unet": {
        "block_out_channels": [8, 16],
        "attention": None,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "patch_size": 2,
    },
    "dit": {"depth": 1, "width": 16, "heads": 2},
}
each_experiment = pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)


def toy(path: Path, tmp_path: Path) -> Config:
    """The experiment with a tiny network and two steps."""
    tree = load_config(path).model_dump()
    tree["backbone"] |= TOY[tree["backbone"]["kind"]]
    tree["train"] |= {"steps": 2, "batch_size": 4 * tree["train"]["accumulate"], "threads": 1, "mixed_precision": "no"}
    tree |= {"output": str(tmp_path / "run"), "track": "none", "sample": {**tree["sample"], "steps": 1}}
    tree["evaluate"]["at_end"] = False
    tree["data"] |= {"workers": 0}
    return parse_config(tree)


def without_data(config: Config) -> Config:
    """What only embedded data would determine, stated."""
    tree = config.model_dump()
    stated: dict[str, dict[str, Any]] = {
        "image": {"channels": 3, "size": 32},
        "masked_image": {"channels": 3, "size": 32},
        "mask": {"num_classes": 7, "size": 32},
        "label": {"num_classes": 10},
        "embedding": {"dim": 32},
        "image_set": {"channels": 3, "size": 32, "max_images": 3},
        "text": {"max_tokens": 9},
    }
    for entry in tree["modalities"].values():
        entry.update({**stated[entry["kind"]], **entry})
    return parse_config(tree)


def test_there_are_experiments() -> None:
    assert {path.stem for path in EXPERIMENTS} >= {
        *("digits", "shapes_all", "camvid_mask", "cifar10_label", "cifar10_masked", "clip_embedding"),
        *("shapes_views", "imagenet64_label", "imagenet64_masked", "cityscapes_mask", "imagenet64_clip"),
        *(f"{data}_{method}" for data in ("cifar10", "shapes") for method in RESTORATION),
    }


@pytest.mark.parametrize("data", ["cifar10", "shapes"])
@pytest.mark.parametrize("method", RESTORATION[1:])
def test_reconstruction_methods_share_all_but_what_they_are_about(data: str, method: str) -> None:
    """The same backbone, data, scheduler, optimizer, steps, samples and averages for each: no baseline is starved."""
    folder = ROOT / "experiments" / "reconstruction"
    one, other = (
        resolve(without_data(load_config(folder / f"{data}_{name}.yaml")), None) for name in (RESTORATION[0], method)
    )
    own = {"name", "states", "train.learning_rate", "modalities.masked_image"}
    if method == "unconditional":
        own.add("data.masking.masked_image")  # nothing is masked in its training
    assert first_difference(one, other, ignore=own) is None
    assert one.train.learning_rate == other.train.learning_rate  # where the sweeps start


@each_experiment
def test_it_is_named_after_its_file(path: Path) -> None:
    assert load_config(path).name == path.stem


@each_experiment
def test_it_steps_on_stand_in_data(path: Path, tmp_path: Path) -> None:
    report = dry_run(without_data(toy(path, tmp_path)))
    assert "FLOPs per step" in report and "parameters" in report
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", [p for p in EXPERIMENTS if "64" in p.stem or "city" in p.stem], ids=lambda p: p.stem)
def test_paper_scale_is_resolved_without_data(path: Path) -> None:
    config = load_config(path)
    assert not needs_data(config)
    assert resolve(config, None).modalities["image"].settings()["channels"] == 3


@pytest.mark.slow
def test_paper_scale_is_the_size_of_adm() -> None:
    """ADM's U-Net for ImageNet 64×64 has 296 million parameters."""
    config = resolve(load_config(ROOT / "experiments" / "imagenet64_label.yaml"), None)
    model = build_model(config)
    assert sum(p.numel() for p in model.backbone.parameters()) / 1e6 == pytest.approx(296, rel=0.1)


@each_experiment
def test_it_trains_on_embedded_data(path: Path, tmp_path: Path) -> None:
    config = toy(path, tmp_path)
    if config.data.source not in EMBEDDED:
        pytest.skip(f"its data are not embedded: {config.data.source}")
    tree = config.model_dump()
    if config.data.source in ("shapes", "textured_digits"):
        tree["data"]["options"] |= {"rows": 32, "validation_rows": 8}
    assert (train(parse_config(tree)) / "pipeline" / "model_index.json").is_file()


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "folder", "changes"),
    [
        ("camvid_mask", "camvid", {}),
        ("cifar10_label", "cifar10", {"columns": {}, "validation_split": "validation"}),
        ("cifar10_masked", "cifar10", {"columns": {}, "validation_split": "validation"}),
        ("clip_embedding", "clip_pairs", {"columns": {}, "holdout": 5, "embeddings": {}}),
    ],
)
def test_it_trains_on_the_same_columns(name: str, folder: str, changes: dict[str, Any], tmp_path: Path) -> None:
    tree = toy(ROOT / "experiments" / f"{name}.yaml", tmp_path).model_dump()
    tree["data"] |= {"source": str(DATA / folder), "cache_mib": 0, **changes}
    assert (train(parse_config(tree)) / "pipeline" / "model_index.json").is_file()
