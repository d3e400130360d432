"""The zero-shot baseline picks the caption of the highest cosine, whatever the number and kind of images."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.metrics.clip_zero_shot import ZeroShot

CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
NAME = "tiny-zero-shot"
NAMES = ["zero", "one", "grey cat", "{braces}"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / f"{NAME}.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(open_clip.create_model(NAME).state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def images(channels: int, count: int = 70) -> Tensor:
    """8-bit levels in [−1, 1]; more than one batch; dark and bright ones, so that classes differ."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (count, channels, 16, 16), generator=generator)
    ceiling = torch.randint(1, 256, (count, channels, 1, 1), generator=generator)
    return (levels * ceiling // 255) / 127.5 - 1


def cosines(checkpoint: Path, pictures: Tensor, template: str) -> Tensor:
    """(n, K), by the model's two towers and a normalisation written out."""
    clip = open_clip.create_model(NAME, str(checkpoint)).eval()
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    pixels = (pictures.expand(-1, 3, -1, -1) + 1) / 2
    pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    tokens = open_clip.SimpleTokenizer(context_length=16)([template.replace("{}", name) for name in NAMES])
    with torch.no_grad():
        return torch.cosine_similarity(clip.encode_image(pixels)[:, None], clip.encode_text(tokens)[None], dim=2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("template", ["a photo of a {}.", "{}"])
def test_classes_are_those_of_the_highest_cosine(checkpoint: Path, channels: int, template: str) -> None:
    judge = ZeroShot(NAME, str(checkpoint), NAMES, template, device="cpu")
    found, expected = judge(images(channels)), cosines(checkpoint, images(channels), template)
    assert found.shape == (70,) and found.dtype == torch.int64
    best = expected.topk(2, dim=1)
    clear = best.values[:, 0] - best.values[:, 1] > 1e-5  # the rest may fall to either side by rounding
    assert clear.sum() >= 65
    assert torch.equal(found[clear], best.indices[clear, 0])
    assert len(found.unique()) > 1


def test_every_class_counts_in_the_order_of_the_names(checkpoint: Path) -> None:
    pictures = images(3)
    forwards = ZeroShot(NAME, str(checkpoint), NAMES, device="cpu")(pictures)
    backwards = ZeroShot(NAME, str(checkpoint), NAMES[::-1], device="cpu")(pictures)
    assert torch.equal(forwards, len(NAMES) - 1 - backwards)


def test_any_split_gives_the_same_classes(checkpoint: Path) -> None:
    judge, pictures = ZeroShot(NAME, str(checkpoint), NAMES, device="cpu"), images(3)
    assert torch.equal(torch.cat([judge(part) for part in pictures.split(9)]), judge(pictures))


def test_the_name_says_model_and_weights_without_the_folder(checkpoint: Path) -> None:
    assert ZeroShot(NAME, str(checkpoint), NAMES, device="cpu").name == f"CLIP zero-shot {NAME}/weights.pt"


@pytest.mark.parametrize(
    ("model", "weights", "names", "template", "key"),
    [
        ("tiny-zero-shut", "weights.pt", NAMES, "{}", r"model = 'tiny-zero-shut': no model of open_clip"),
        (NAME, "nonesuch", NAMES, "{}", "pretrained = 'nonesuch'"),
        (NAME, None, NAMES, "{}", "pretrained = None"),
        (NAME, "weights.pt", [], "{}", r"names = \[\]"),
        (NAME, "weights.pt", NAMES, "a photo", "template = 'a photo'"),
    ],
)
def test_unusable_settings_are_one_line(
    checkpoint: Path,
    model: str,
    weights: str | None,
    names: list[str],
    template: str,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    with pytest.raises(InputError, match=rf"^evaluate\.zero_shot\.{key}"):
        ZeroShot(model, weights, names, template, device="cpu")
