"""`mmdiff sample` on every kind of modality: what it writes it reads back, what does not fit is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmdiff.errors import InputError
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.runs import generators, prepare, read_guidance, read_observed

Cli = Callable[..., Any]
NAMES = ("depth", "embedding", "image", "label", "mask", "masked_image")
FILES = {"depth": "npy", "embedding": "npy", "image": "png", "label": "txt", "mask": "png", "masked_image": "png"}
HOLE = np.full((12, 20), 255, np.uint8)
HOLE[4:8, 6:14] = 0


@pytest.fixture
def pipe(all_kinds: Path) -> MTDiffusionPipeline:
    pipe = MTDiffusionPipeline.from_pretrained(all_kinds)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of a person, in the working directory."""
    monkeypatch.chdir(tmp_path)
    numbers = np.random.default_rng(0)
    colours = numbers.integers(256, size=(12, 20, 3), dtype=np.uint8)
    ids = numbers.integers(4, size=(8, 8), dtype=np.uint8)
    Image.fromarray(colours).save("photo.png")
    Image.fromarray(colours[..., 0]).save("grey.png")
    Image.fromarray(HOLE).save("hole.png")
    Image.fromarray(HOLE[:8]).save("other.png")
    Image.fromarray(np.dstack([colours, HOLE])).save("alpha.png")
    Image.fromarray(ids).save("ids.png")
    Image.fromarray(ids.repeat(2, 0).repeat(2, 1)).save("large.png")
    Image.fromarray(ids + 4).save("beyond.png")
    np.save("vec.npy", np.arange(1.0, 6.0))
    np.save("four.npy", np.ones(4))
    np.save("depth.npy", numbers.normal(size=(8, 8)).astype(np.float32))
    Path("vec.json").write_text("[1, 2, 3, 4, 5]")
    Path("class.txt").write_text("square\n")
    Path("other.txt").write_text("hexagon\n")
    return tmp_path


def draw(cli: Cli, folder: Path, *arguments: object, num: int = 3) -> Any:
    return cli("sample", folder, "--num", num, "--steps", 2, *arguments)


# ------------------------------------------------------------------------------------------------------- round trips


def test_each_sample_is_a_file_per_modality_that_observe_reads_back(
    cli: Cli, all_kinds: Path, pipe: MTDiffusionPipeline, here: Path
) -> None:
    answer = draw(cli, all_kinds, "--save-each", "each")
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[-1] == "wrote 3 samples to each"
    names = {str(path.relative_to("each")) for path in Path("each").rglob("*") if path.is_file()}
    assert names == {f"{name}/{index:04d}.{FILES[name]}" for name in NAMES for index in range(3)}
    drawn = pipe(3, num_inference_steps=2, generator=generators(0, 3)).samples
    for index in range(3):
        paths = {name: f"each/{name}/{index:04d}.{FILES[name]}" for name in NAMES}
        read = read_observed(pipe.model, [f"{name}={path}" for name, path in paths.items()])
        for name, modality in pipe.model.modalities.items():
            assert torch.equal(modality.preprocess(read[name]), modality.preprocess(drawn[name][index])), name
    assert Path("each/label/0000.txt").read_text().strip() in ("circle", "square", "triangle")
    with Image.open("each/mask/0000.png") as mask:
        assert mask.mode == "P" and np.asarray(mask).max() < 4
    seen = [part for name, path in paths.items() for part in ("--observe", f"{name}={path}")]
    answer = draw(cli, all_kinds, "--out", "again.png", "--save-each", "again", *seen, num=1)
    assert answer.code == 0, answer.err
    for name, path in paths.items():
        assert Path(f"again/{name}/0000.{FILES[name]}").read_bytes() == Path(path).read_bytes(), name


@pytest.mark.parametrize(
    ("text", "raw"),
    {
        "label=triangle": 2,
        "label=1": 1,
        "label=class.txt": 1,
        "embedding=vec.npy": [1.0, 2.0, 3.0, 4.0, 5.0],
        "embedding=vec.json": [1.0, 2.0, 3.0, 4.0, 5.0],
        "embedding=1,2,3,4,5": [1.0, 2.0, 3.0, 4.0, 5.0],
    }.items(),
)
def test_labels_and_vectors_are_read_from_texts_and_files(
    pipe: MTDiffusionPipeline, here: Path, text: str, raw: Any
) -> None:
    name = text.partition("=")[0]
    modality = pipe.model.modalities[name]
    assert torch.equal(modality.preprocess(read_observed(pipe.model, [text])[name]), modality.preprocess(raw))


def test_numbers_on_the_command_line_are_one_vector(cli: Cli, all_kinds: Path, here: Path) -> None:
    answer = draw(cli, all_kinds, "--observe", "embedding=1,2,3,4,5", "--save-each", "each", num=2)
    assert answer.code == 0, answer.err
    assert [np.load(f"each/embedding/000{k}.npy").tolist() for k in range(2)] == [[1, 2, 3, 4, 5]] * 2


def test_photos_are_cut_to_their_centre_and_resized(pipe: MTDiffusionPipeline, here: Path) -> None:
    items = ["image=photo.png", "mask=large.png", "masked_image=photo.png@hole.png"]
    values = {
        name: pipe.model.modalities[name].preprocess(raw) for name, raw in read_observed(pipe.model, items).items()
    }
    with Image.open("photo.png") as photo, Image.open("ids.png") as ids:
        centre = photo.resize((8, 8), Image.Resampling.BICUBIC, box=(4, 0, 16, 12))
        expected = np.asarray(centre, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
        assert np.abs(values["image"].numpy() - expected).max() < 1e-6
        assert np.array_equal(values["mask"].numpy(), np.asarray(ids))  # twice as large: nearest gives it back
    # the hole's rows 4 … 7 of 12 and columns 2 … 9 of the centre's 12, seen from the middle of every third half
    hole = [(r * 1.5 + 0.75, c * 1.5 + 0.75) for r in range(8) for c in range(8)]
    known = [not (4 <= r < 8 and 2 <= c < 10) for r, c in hole]
    assert (values["masked_image"][-1].flatten() > 0).tolist() == known
    alpha = pipe.model.modalities["masked_image"].parse("alpha.png")
    assert torch.equal(pipe.model.modalities["masked_image"].preprocess(alpha), values["masked_image"])


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_photo_is_turned_upright(pipe: MTDiffusionPipeline, here: Path, orientation: int) -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8))
    turns = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = upright if orientation == 1 else upright.transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save("turned.png", exif=exif)
    image = pipe.model.modalities["image"]
    assert torch.equal(image.preprocess(image.parse("turned.png")), image.preprocess(upright))


# ----------------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "--observe label=hexagon": "observed.label = 'hexagon': write a class id, 0 … 2, or a name: circle, square, tri",
    "--observe label=other.txt": "observed.label = 'hexagon': write a class id, 0 … 2, or a name",
    "--observe label=nowhere.txt": "observed.label = 'nowhere.txt': no such file",
    "--observe label=3": "observed.label = 3: is outside 0 … 2",
    "--observe image=nowhere.png": "observed.image = 'nowhere.png': no such file",
    "--observe image=": "observed.image = '': no such file",
    "--observe mask=photo.png": "observed.mask = 'RGB': is coloured: ",
    "--observe mask=beyond.png": "observed.mask = ",
    "--observe mask=nowhere.png": "observed.mask = 'nowhere.png': no such file",
    "--observe masked_image=photo.png": "observed.masked_image = 'photo.png': has no alpha channel",
    "--observe masked_image=photo.png@": "observed.masked_image = 'photo.png@': names no file after the @",
    "--observe masked_image=photo.png@other.png": "observed.masked_image = 'photo.png@other.png': the photo and its m",
    "--observe masked_image=photo.png@no.png": "observed.masked_image = 'no.png': no such file",
    "--observe embedding=four.npy": "observed.embedding = '4 numbers': expected 5",
    "--observe embedding=nowhere.npy": "observed.embedding = 'nowhere.npy': no such file",
    "--observe embedding=0,0,0,0,0": "observed.embedding = 'a vector': must be finite and not zero",
    "--observe embedding=photo.png": "observed.embedding = 'photo.png': cannot be read as .npy, .json or numbers",
    "--observe depth=vec.npy": "observed.depth = 'ndarray': is no map of numbers",
    "--observe depth=nowhere.npy": "observed.depth = 'nowhere.npy': no such file",
    "--save-each .": "--save-each = '.': exists; choose another folder",
    "--save-each photo.png": "--save-each = 'photo.png': exists; choose another folder",
    "--out grid.txt": "--out = 'grid.txt': is no PNG",
    "--guidance -1": "--guidance = '-1': is no number ≥ 0",
    "--guidance label=two": "--guidance = 'two': is no number ≥ 0",
    "--guidance label=2,label=3": "--guidance = 'label=2,label=3': write one number, or modality=number, each",
    "--guidance 2,3": "--guidance = '2,3': write one number, or modality=number",
    "--guidance label=2": "guidance_scale.label = 2.0: this modality is not observed",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(cli: Cli, all_kinds: Path, here: Path, arguments: str) -> None:
    before = sorted(here.rglob("*"))
    answer = draw(cli, all_kinds, *arguments.split())
    assert answer.code == 2
    assert answer.complaint.startswith(REFUSED[arguments])
    assert sorted(here.rglob("*")) == before


def test_nothing_is_overwritten(cli: Cli, all_kinds: Path, here: Path) -> None:
    assert draw(cli, all_kinds, "--save-each", "each", num=1).code == 0
    kept = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    for arguments in ([], ["--out", "b.png", "--save-each", "each"]):
        answer = draw(cli, all_kinds, "--seed", 1, *arguments, num=1)
        assert answer.code == 2 and "exists" in answer.complaint
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == kept


# ---------------------------------------------------------------------------------------------------- other options


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2", 2.0), ("0", 0.0), ("label=2", {"label": 2.0}), ("label=2,embedding=1.5", {"label": 2.0, "embedding": 1.5})],
)
def test_guidance_is_a_number_or_one_per_modality(text: str, expected: Any) -> None:
    assert read_guidance(text) == expected


@pytest.mark.parametrize("text", ["", "label=", "=2", "nan", "inf", "label=2,", "1 2", "label=2,3"])
def test_other_guidance_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--guidance = "):
        read_guidance(text)


def test_guidance_per_modality_matters(cli: Cli, all_kinds: Path, here: Path) -> None:
    seen = ["--observe", "label=circle", "--observe", "embedding=vec.npy"]
    grids = []
    for index, scales in enumerate(("1", "label=1,embedding=1", "label=3,embedding=1", "label=1,embedding=3", "3")):
        answer = draw(cli, all_kinds, *seen, "--guidance", scales, "--out", f"{index}.png")
        assert answer.code == 0, answer.err
        grids.append(Path(f"{index}.png").read_bytes())
    assert grids[0] == grids[1] and len(set(grids)) == 4


def test_sample_k_depends_on_the_seed_and_on_k_alone(cli: Cli, all_kinds: Path, here: Path) -> None:
    for num, seed in ((2, 0), (3, 0), (2, 1)):
        out = ["--out", f"{num}-{seed}.png", "--save-each", f"{num}-{seed}"]
        assert draw(cli, all_kinds, "--seed", seed, *out, num=num).code == 0
    pixels = {
        key: [np.asarray(Image.open(f"{key}/image/000{k}.png")).astype(int) for k in range(2)]
        for key in ("2-0", "3-0", "2-1")
    }
    for k in range(2):
        assert np.abs(pixels["2-0"][k] - pixels["3-0"][k]).max() <= 1  # a rounding of 1e-5 may cross a grey level
        assert np.abs(pixels["2-0"][k] - pixels["2-1"][k]).max() > 10
    assert np.abs(pixels["2-0"][0] - pixels["2-0"][1]).max() > 10


def test_the_batch_size_changes_nothing(cli: Cli, all_kinds: Path, here: Path) -> None:
    for size in (1, 2, 100):
        answer = draw(cli, all_kinds, "--batch-size", size, "--out", f"{size}.png", "--save-each", f"each-{size}")
        assert answer.code == 0, answer.err
    for size in (1, 2):
        for k in range(3):
            for name in ("image", "mask"):
                one, other = (Image.open(f"each-{n}/{name}/000{k}.png") for n in (size, 100))
                assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= (1 if name == "image" else 0)
            one, other = (np.load(f"each-{n}/embedding/000{k}.npy") for n in (size, 100))
            assert np.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_the_networks_precision_is_an_option(cli: Cli, all_kinds: Path, here: Path) -> None:
    for dtype in ("fp32", "bf16"):
        answer = draw(cli, all_kinds, "--dtype", dtype, "--out", f"{dtype}.png", "--save-each", dtype)
        assert answer.code == 0, answer.err
    one, other = (np.stack([np.load(f"{n}/embedding/000{k}.npy") for k in range(3)]) for n in ("fp32", "bf16"))
    assert 0 < np.abs(one - other).max() < 0.1 * np.abs(one).max()
    answer = draw(cli, all_kinds, "--dtype", "fp8", "--out", "fp8.png")
    assert answer.code == 2 and answer.complaint == "--dtype = 'fp8': choose one of fp32, bf16"


def test_compiling_is_in_place_and_waits_for_the_first_call(pipe: MTDiffusionPipeline) -> None:
    keys, backbone = list(pipe.model.state_dict()), pipe.model.backbone
    prepare(pipe, "fp32", compiled=False)
    assert backbone._compiled_call_impl is None
    prepare(pipe, "fp32", compiled=True)
    assert pipe.model.backbone is backbone and backbone._compiled_call_impl is not None
    assert list(pipe.model.state_dict()) == keys
