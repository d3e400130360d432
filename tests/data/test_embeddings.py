"""Embeddings of images are those of the frozen tower, missing stays missing, and nothing is computed twice."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from refusals import refused
from safetensors.torch import save_file
from torch import Tensor

from mmdiff.data import digits
from mmdiff.data.embeddings import add_embeddings

CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
NAME = "tiny-embeddings"
ROWS = 7
MISSING = (0, 4, 5)  # with batches of two: part of a batch, and a whole one


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "mmdiff-embeddings"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / f"{NAME}.json")
    return write_weights(tmp_path / "weights.pt", seed=0)


def write_weights(path: Path, seed: int) -> Path:
    state = network(seed).state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def network(seed: int) -> open_clip.CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_clip.create_model(NAME).eval()


def pictures(size: tuple[int, ...] = (16, 16, 3)) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (ROWS, *size), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


def rows(images: list[Image.Image]) -> datasets.Dataset:
    columns = {"photo": [None if i in MISSING else image for i, image in enumerate(images)], "label": list(range(ROWS))}
    features = datasets.Features({"photo": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(columns, features=features, split="train")


def by_hand(clip: open_clip.CLIP, image: Image.Image) -> Tensor:
    """An image of the tower's size needs no resizing: scaled to [0, 1] and normalised by OpenAI's constants."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    with torch.no_grad():
        return clip.visual((pixels - mean) / std)[0]


def embed(
    source: datasets.Dataset, pretrained: Path | str | None, model: str = NAME, **changes: Any
) -> datasets.Dataset:
    pretrained = None if pretrained is None else str(pretrained)
    arguments = {"column": "clip", "image_column": "photo", "batch_size": 2, "device": "cpu"} | changes
    return add_embeddings(source, model=model, pretrained=pretrained, **arguments)


def vectors(source: datasets.Dataset, column: str = "clip") -> Tensor:
    return torch.tensor([vector for vector in source[column] if vector is not None])


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a stand-in for the network: a trap."""

    def trap(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was built")

    for name in ("create_model", "create_model_from_pretrained", "create_model_and_transforms"):
        monkeypatch.setattr(open_clip, name, trap)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("size", [(16, 16, 3), (16, 16)])
def test_embeddings_are_those_of_the_tower(checkpoint: Path, suffix: str, size: tuple[int, ...]) -> None:
    images, weights = pictures(size), write_weights(checkpoint.with_suffix(suffix), seed=3)
    result = embed(rows(images), weights)
    assert result.column_names == ["photo", "label", "clip"]
    assert result.split == "train" and result["label"] == list(range(ROWS))
    assert result.features["clip"] == datasets.List(datasets.Value("float32"))
    clip = network(seed=3)
    for i, vector in enumerate(result["clip"]):
        assert (vector is None) == (i in MISSING)
        if vector is not None:
            torch.testing.assert_close(torch.tensor(vector), by_hand(clip, images[i]), rtol=1e-4, atol=1e-5)
    assert (vectors(result).norm(dim=1) - 1).abs().min() > 1e-3


def test_images_of_another_size_are_prepared_as_the_model_wants(checkpoint: Path) -> None:
    """The short side is brought to 16 pixels, the middle is cut out."""
    images = pictures((20, 40, 3))
    found = embed(rows(images), checkpoint)["clip"][1]
    middle = images[1].resize((32, 16), Image.Resampling.BICUBIC).crop((8, 0, 24, 16))
    torch.testing.assert_close(torch.tensor(found), by_hand(network(0), middle), rtol=1e-4, atol=1e-5)


def test_a_second_call_reads_the_cache(checkpoint: Path, cache: Path, request: pytest.FixtureRequest) -> None:
    first = embed(rows(pictures()), checkpoint)
    (file,) = cache.iterdir()  # and nothing temporary is left
    moved = checkpoint.rename(checkpoint.with_name("moved.pt"))
    request.getfixturevalue("no_model")
    assert torch.equal(vectors(embed(rows(pictures()), moved)), vectors(first))
    other_name = embed(rows(pictures()), moved, column="tower")
    assert torch.equal(vectors(other_name, "tower"), vectors(first))
    assert list(cache.iterdir()) == [file]


def test_a_selection_and_a_file_on_disk_are_cached_too(
    checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    rows(pictures()).to_parquet(tmp_path / "rows.parquet")

    def chosen() -> datasets.Dataset:
        source = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "arrow"))
        return source.select([6, 0, 1])

    first, expected = embed(chosen(), checkpoint), by_hand(network(seed=0), pictures()[6])
    request.getfixturevalue("no_model")
    second = embed(chosen(), checkpoint)
    assert first["label"] == second["label"] == [6, 0, 1]
    assert second["clip"] == first["clip"] and second["clip"][1] is None
    torch.testing.assert_close(torch.tensor(second["clip"][0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["weights", "images"])
def test_other_weights_or_images_give_other_embeddings(checkpoint: Path, change: str) -> None:
    first = vectors(embed(rows(pictures()), checkpoint))
    images = pictures()
    if change == "weights":
        write_weights(checkpoint, seed=1)
    else:
        images[1] = images[1].rotate(90)
    second = vectors(embed(rows(images), checkpoint))
    same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    assert same == ([False] * 4 if change == "weights" else [False, True, True, True])


def test_a_local_folder_carries_its_weights(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    model = f"local-dir:{folder}"
    with refused("data.embeddings.clip.model"):  # never random weights
        embed(rows(pictures()), None, model)
    with refused("data.embeddings.clip.pretrained"):
        embed(rows(pictures()), checkpoint, model)
    write_weights(folder / "open_clip_model.safetensors", seed=0)
    torch.testing.assert_close(
        vectors(embed(rows(pictures()), None, model)), vectors(embed(rows(pictures()), checkpoint)), rtol=0, atol=1e-6
    )


UNUSABLE = [  # model, weights, the key that is wrong, what the line names
    ("ViT-B-3", "openai", "model", "ViT-B-32"),
    ("ViT-B-32", "opena", "pretrained", "openai"),
    ("ViT-B-32", None, "pretrained", "openai"),
    (NAME, None, "pretrained", NAME),
    (NAME, "empty.pt", "pretrained", "empty.pt"),
    (NAME, "other.pt", "pretrained", "other.pt"),
]


def test_unusable_models_are_one_line(checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    Path("empty.pt").touch()
    torch.save({"bias": torch.zeros(3)}, "other.pt")
    for model, pretrained, key, fact in UNUSABLE:
        with refused(f"data.embeddings.clip.{key}", {"model": model, "pretrained": pretrained}[key], fact):
            embed(rows(pictures()), pretrained, model)
        assert list(cache.iterdir()) == []


def test_unusable_columns_are_one_line(checkpoint: Path) -> None:
    for changes, key, value in [
        ({"image_column": "label"}, "clip.column", "label"),
        ({"image_column": "picture"}, "clip.column", "picture"),
        ({"column": "label"}, "label", "label"),
    ]:
        with refused(f"data.embeddings.{key}", value):
            embed(rows(pictures()), checkpoint, **changes)


def test_another_process_reads_the_cache(checkpoint: Path, cache: Path) -> None:
    """It does not even import open_clip, where the tiny model would be unknown."""
    code = (
        "import datasets, sys, pathlib\n"
        "from mmdiff.data import digits\n"
        "from mmdiff.data.embeddings import add_embeddings\n"
        "datasets.config.HF_DATASETS_CACHE = pathlib.Path(sys.argv[1])\n"
        "rows = add_embeddings(digits.load()['validation'], 'clip', 'image', sys.argv[2], sys.argv[3])\n"
        "assert 'open_clip' not in sys.modules\n"
        "print(rows['clip'][298])\n"
    )
    ours = embed(digits.load()["validation"], checkpoint, image_column="image", batch_size=64)["clip"]
    arguments = [sys.executable, "-c", code, str(cache.parent), NAME, str(checkpoint)]
    other = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[2])
    assert json.loads(other.stdout) == ours[298]


def test_rivals_that_compute_at_once_leave_one_whole_file(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found no cache when they build the model; whoever renames last, it is one of two equal files."""
    build, both = open_clip.create_model_from_pretrained, threading.Barrier(2, timeout=60)

    def together(*arguments: Any, **settings: Any) -> Any:
        both.wait()
        return build(*arguments, **settings)

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", together)
    source = rows(pictures())
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: embed(source, checkpoint)["clip"], range(2))
    assert one == other
    (file,) = cache.iterdir()
    assert len(datasets.Dataset.from_file(str(file))) == ROWS
