"""A training on an encoded folder is the training on its source, bit for bit; the folder is whole, or goes on."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from networks import LAYERS
from refusals import refused
from safetensors.torch import save_file
from torch import Tensor

from mmdiff.build import build, build_stand_in
from mmdiff.config import Config, as_yaml, parse_config
from mmdiff.encode import Request, run
from mmdiff.errors import InputError
from mmdiff.training.process import make_accelerator
from mmdiff.training.trainer import Trainer

SIZE = 16
KL = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
KL |= {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
TINY = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
TINY |= {f"num_{side}_blocks": (1, 1) for side in ("encoder", "decoder")}
HOLES = {"masking": {"masked": {"pattern": "box", "ratio": 0.3}}}


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    classes = {"kl": (AutoencoderKL, KL), "tiny": (AutoencoderTiny, TINY), "other": (AutoencoderKL, KL)}
    for seed, (name, (network, settings)) in enumerate(classes.items()):
        torch.manual_seed(seed)
        network(**settings).save_pretrained(folder / name)
    return folder


def config(folder: Path, image: dict[str, Any] | None = None, holes: bool = True, **data: Any) -> Config:
    """Shapes with masks and labels, of which some are missing."""
    source = {"source": "shapes", "options": {"rows": 20, "validation_rows": 5, "size": SIZE}}
    modalities = {"image": {"kind": "image", **(image or {})}, "mask": {"kind": "mask"}, "label": {"kind": "label"}}
    return parse_config({
        "name": "encoded",
        "output": str(folder / "run"),
        "data": {**source, "missing": {"label": 0.5, "image": 0.2}, **(HOLES if holes else {}), **data},
        "modalities": {**modalities, **({"masked": {"kind": "masked_image"}} if holes else {})},
        "backbone": dict(LAYERS),
        "scheduler": {"num_train_timesteps": 50},
        "train": {"steps": 2, "batch_size": 6, "threads": 1, "log_every": 1},
        "sample": {"steps": 2},
        "evaluate": {"at_end": False},
    })  # fmt: skip


def on(asked: Config, folder: Path, **data: Any) -> Config:
    """The same experiment on an encoded folder."""
    return asked.model_copy(update={"data": asked.data.model_copy(update={"source": str(folder), **data})})


def steps(asked: Config, count: int = 3) -> list[Tensor]:
    """The terms of a few steps, and the weights after them."""
    trainer = Trainer(build(asked), make_accelerator(asked.train))
    loader = trainer.loader(0)
    terms = [trainer.step(*next(loader)) for _ in range(min(count, asked.train.steps))]
    loader.close()
    return [*(torch.stack(list(term.values())) for term in terms), *trainer.bare.state_dict().values()]


def encode(asked: Config, out: Path, **settings: Any) -> Path:
    run(Request(asked, out, progress=False, **{"rows_per_shard": 8, **settings}))
    return out


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


# ------------------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize(
    ("image", "settings"),
    [
        ({}, {}),
        ({}, {"augment": {"flip": 0.5, "crop": [0.5, 1.0]}}),
        ({"autoencoder": "kl", "latent_draw": True}, {}),
        ({"autoencoder": "kl", "latent_scale": "measured"}, {"holes": False}),
        ({"autoencoder": "tiny"}, {}),
        ({"autoencoder": "kl"}, {"augment": {"flip": 0.5}}),
    ],
    ids=["pixels", "changed pixels", "drawn latents", "measured latents alone", "tiny latents", "changed latents"],
)
def test_training_on_the_folder_is_training_on_the_source(
    tmp_path: Path, networks: Path, image: dict[str, Any], settings: dict[str, Any]
) -> None:
    if image:
        image = {"space": "latent", **image, "autoencoder": str(networks / image["autoencoder"])}
    asked = config(tmp_path, image, **settings)
    folder = encode(asked, tmp_path / "encoded")
    encoded = on(asked, folder)
    assert all(map(torch.equal, steps(asked), steps(encoded)))
    reads = build(encoded).train.columns.values()
    assert ("image/latents" in reads) == (bool(image) and "augment" not in settings)
    assert ("image" in reads) == (not image or settings.get("holes", True))
    assert build_stand_in(encoded).model.space == build(asked).model.space


def test_whatever_reads_parquet_reads_the_folder(tmp_path: Path) -> None:
    folder = encode(config(tmp_path), tmp_path / "encoded")
    files = {split: f"{folder}/{split}-*.parquet" for split in ("train", "validation")}
    plain = datasets.load_dataset("parquet", data_files=files)
    assert {split: len(rows) for split, rows in plain.items()} == manifest(folder)["rows"]
    assert plain["train"][3]["image"].size == (SIZE, SIZE) and plain["train"][3]["label"] in range(5)


CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


def test_frozen_embeddings_are_in_the_folder_and_need_their_model_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tower = tmp_path / "clip"
    tower.mkdir()
    (tower / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP}))
    (tower / "tower.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(tower / "tower.json")
    save_file(open_clip.create_model("tower").state_dict(), tower / "open_clip_model.safetensors")
    shapes = build(config(tmp_path)).train.rows
    rows = [{"image": shapes[row]["image"], "label": row % 2} for row in range(12)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    asked = on(config(tmp_path, holes=False), tmp_path / "rows.parquet", options={}, holdout=4)
    tree = asked.model_dump()
    tree["modalities"] = {"image": {"kind": "image"}, "clip": {"kind": "embedding"}}
    tree["data"] |= {"embeddings": {"clip": {"model": f"local-dir:{tower}", "pretrained": None}}, "missing": {}}
    asked = parse_config(tree)
    folder, plain = encode(asked, tmp_path / "encoded"), steps(asked)
    shutil.rmtree(tower)
    assert all(map(torch.equal, plain, steps(on(asked, folder))))
    other = asked.data.embeddings["clip"].model_copy(update={"model": "ViT-B-32"})
    with refused("data.embeddings"):
        build(on(asked, folder, embeddings={"clip": other}))


def test_broken_values_are_missing_ones_in_the_folder_too(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": b"no image", "path": None} if row == 3 else None, "label": row % 2} for row in range(8)]
    good = build(config(tmp_path)).train.rows[0]["image"]
    rows = [{**row, "image": row["image"] or good} for row in rows]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    asked = config(tmp_path, {"size": SIZE, "channels": 3}, holes=False, on_error="skip", max_errors=0.5, holdout=4)
    asked = on(asked, tmp_path / "rows.parquet", options={})
    asked = asked.model_copy(update={"modalities": {n: m for n, m in asked.modalities.items() if n != "mask"}})
    folder = encode(asked, tmp_path / "encoded")
    assert ["row 3" in line for line in sum(manifest(folder)["unusable"].values(), [])] == [True]
    assert all(map(torch.equal, steps(asked), steps(on(asked, folder, holdout=None))))


def test_latents_alone_train_and_say_what_they_cannot(tmp_path: Path, networks: Path) -> None:
    image = {"space": "latent", "autoencoder": str(networks / "kl")}
    asked = config(tmp_path, image, holes=False)
    folder = encode(asked, tmp_path / "encoded", images=False, dtype="float16")
    assert "image" not in manifest(folder)["columns"]
    for ours, exact in zip(steps(on(asked, folder)), steps(asked), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0.02, atol=0.02)
    with refused("data.source", str(folder)):
        build(on(asked, folder)).train.all()
    with refused("data.source", str(folder)):
        build(on(config(tmp_path, holes=False), folder))
    with refused("--no-images"):
        encode(config(tmp_path, image), tmp_path / "other", images=False)


# ------------------------------------------------------------------------------------------------------------- stopping


def test_a_killed_encoding_goes_on_to_the_same_bytes(
    tmp_path: Path, networks: Path, forked: Callable[..., Any]
) -> None:
    asked = config(tmp_path, {"space": "latent", "autoencoder": str(networks / "kl")})
    whole = encode(asked, tmp_path / "whole", rows_per_shard=2)
    (tmp_path / "c.yaml").write_text(as_yaml(asked))
    command = ["encode", tmp_path / "c.yaml", "--out", tmp_path / "cut", "--rows-per-shard", 2]
    (process,) = forked(command, tmp_path / "log").processes
    while process.is_alive() and not (tmp_path / "cut" / "train-00002.parquet").exists():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not manifest(tmp_path / "cut")["complete"]
    with refused("data.source", str(tmp_path / "cut")):
        build(on(asked, tmp_path / "cut"))
    encode(asked, tmp_path / "cut", rows_per_shard=2)
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "cut").iterdir()) and "encode.lock" not in names
    assert all((whole / name).read_bytes() == (tmp_path / "cut" / name).read_bytes() for name in names)
    before = {path: path.stat().st_mtime_ns for path in whole.glob("*.parquet")}
    encode(asked, whole, rows_per_shard=2)  # nothing is left to do
    assert before == {path: path.stat().st_mtime_ns for path in whole.glob("*.parquet")}


# ------------------------------------------------------------------------------------------------------------- refusals


def _modality(**settings: Any) -> Callable[[Config, Path], Config]:
    def change(asked: Config, networks: Path) -> Config:
        own = {k: str(networks / v) if k == "autoencoder" else v for k, v in settings.items()}
        image = asked.modalities["image"].model_copy(update=own)
        return asked.model_copy(update={"modalities": {**asked.modalities, "image": image}})

    return change


def _data(**settings: Any) -> Callable[[Config, Path], Config]:
    return lambda asked, networks: asked.model_copy(update={"data": asked.data.model_copy(update=settings)})


def _new_modality(asked: Config, networks: Path) -> Config:
    more = {"depth": asked.modalities["label"].model_copy(update={"kind": "vector"})}
    return asked.model_copy(update={"modalities": {**asked.modalities, **more}})


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, networks: Path) -> tuple[Config, Path]:
    folder = tmp_path_factory.mktemp("encoded")
    asked = config(folder, {"space": "latent", "autoencoder": str(networks / "kl")})
    return asked, encode(asked, folder / "encoded")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (_modality(autoencoder="other"), "modalities.image.autoencoder"),
        (_modality(size=32), "modalities.image.size"),
        (_modality(resize=True), "modalities.image.resize"),
        (_modality(channels=1), "modalities.image.channels"),
        (_new_modality, "modalities.depth"),
        (_data(options={"rows": 21}), "data.options"),
        (_data(holdout=3), "data.holdout"),
    ],
)
def test_a_stale_folder_is_refused_by_the_key_that_differs(
    encoded: tuple[Config, Path], networks: Path, change: Callable[[Config, Path], Config], key: str
) -> None:
    asked, folder = encoded
    with refused(key):
        build(on(change(asked, networks), folder))


def _cut(folder: Path) -> None:
    file = folder / "train-00001.parquet"
    file.write_bytes(file.read_bytes()[:-1])


def _gone(folder: Path) -> None:
    (folder / "train-00001.parquet").unlink()


def _out_of_it(folder: Path) -> None:
    shutil.move(folder / "train-00001.parquet", folder.parent / "elsewhere.parquet")
    (folder / "train-00001.parquet").symlink_to(folder.parent / "elsewhere.parquet")


def _text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "manifest.json").write_text(text) and None


def _other(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _text(json.dumps({**manifest(folder), **changes}))(folder)


@pytest.mark.parametrize(
    "damage",
    [_cut, _gone, _out_of_it, _text("{"), _text("[]"), _other(format=99), _other(config={}), _other(rows={"train": 1})],
)
def test_a_damaged_folder_is_refused(
    encoded: tuple[Config, Path], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    asked, folder = encoded
    folder = Path(shutil.copytree(folder, tmp_path / "encoded"))
    damage(folder)
    with pytest.raises(InputError) as caught:
        build(on(asked, folder))
    assert caught.value.key.startswith("data.source") and "\n" not in str(caught.value)


def test_a_folder_that_is_not_free_is_refused(encoded: tuple[Config, Path], tmp_path: Path, networks: Path) -> None:
    asked, folder = encoded
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for out in ("file", "mine"):
        with refused("--out", str(tmp_path / out)):
            encode(asked, tmp_path / out)
    with refused("modalities.image.background"):
        encode(_modality(background=0)(asked, networks), folder)
    with refused("--rows-per-shard", 9):
        encode(asked, folder, rows_per_shard=9)
    with refused("data.source", str(folder)):
        encode(on(asked, folder), tmp_path / "new")
    held = folder / "encode.lock"
    record = {"pid": os.getppid(), "host": "another machine", "folder": folder.stat().st_ino}
    held.write_text(json.dumps(record))
    with refused("--out", str(folder)):
        encode(asked, folder)
    held.unlink()
