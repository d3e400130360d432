"""Masked images: the hole is a channel, the head predicts the whole anchor, and known pixels come back bit-exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import LAYERS
from PIL import Image as PILImage
from torch import Generator, Tensor
from torch.distributions import Normal

from mmdiff.errors import InputError
from mmdiff.modalities import FillsAnchor, MaskedImage, Shape
from mmdiff.model import MTDiffusionModel
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.schedulers import MTDiffusionScheduler

SHAPE = Shape((3, 8, 8), 4, 4)
PIXELS = np.random.default_rng(0).integers(256, size=(8, 8, 4), dtype=np.uint8)
PIXELS[..., 3] = np.where(PIXELS[..., 3] < 100, 0, 255)


def masked_image(channels: int = 3, shape: Shape = SHAPE, **settings: Any) -> MaskedImage:
    torch.manual_seed(0)
    return MaskedImage(shape, channels=channels, **{"size": 8, **settings})


def values(count: int = 2, channels: int = 3) -> Tensor:
    """Half of the pixels known."""
    generator = Generator().manual_seed(0)
    pixels = torch.rand(count, channels, 8, 8, generator=generator) * 2 - 1
    known = (torch.rand(count, 1, 8, 8, generator=generator) < 0.5).float()
    return torch.cat([pixels * known, known], dim=1)


def test_a_smooth_fill_is_the_weighted_mean_of_known_pixels_and_leaves_those_alone() -> None:
    modality, value = masked_image(fill="smooth"), values().double()
    pixels, known = value[:, :3], value[:, 3:]
    seen = modality.observe(value)
    assert torch.equal(seen[:, 3:], known) and torch.equal(seen[:, :3] * known, pixels)
    places = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).double()  # (64, 2)
    weights = torch.exp(-0.5 * (torch.cdist(places, places) / (8 / 32)).square()) * known.flatten(2)  # (B, 64, 64)
    means = torch.einsum("bpq,bcq->bcp", weights, pixels.flatten(2)) / weights.sum(2)[:, None]
    hole = ~known.bool().expand_as(pixels)
    torch.testing.assert_close(seen[:, :3][hole], means.reshape(pixels.shape)[hole], rtol=1e-9, atol=1e-9)


def test_a_constant_image_is_filled_with_its_constant_and_an_unknown_one_with_zeros() -> None:
    known = torch.zeros(2, 1, 8, 8)
    known[0, 0, 3, 5] = 1.0
    seen = masked_image(fill="smooth").observe(torch.cat([0.25 * known.expand(2, 3, 8, 8), known], dim=1))
    torch.testing.assert_close(seen[0, :3], torch.full((3, 8, 8), 0.25))
    assert not seen[1].any()


def test_an_unknown_fill_is_refused() -> None:
    with pytest.raises(InputError, match="fill = 'blurred': choose zero or smooth"):
        masked_image(fill="blurred")


# ---------------------------------------------------------------------------------------------------- raw values


def test_the_alpha_channel_is_what_is_known() -> None:
    value = masked_image().preprocess(PILImage.fromarray(PIXELS))
    known = torch.from_numpy(PIXELS[..., 3] == 255)
    assert torch.equal(value[3], known.float())
    assert torch.equal(value[:3, known], torch.from_numpy(PIXELS[known.numpy()].T[:3] / np.float32(127.5) - 1))
    assert not value[:3, ~known].any()


def test_a_black_pixel_is_no_hole() -> None:
    modality = masked_image()
    black, hidden, grey = (np.full((8, 8, 4), 0, np.uint8) for _ in range(3))
    black[..., 3] = 255
    grey[...] = 128
    grey[..., 3] = 255
    ours = [modality.preprocess(PILImage.fromarray(pixels)) for pixels in (black, hidden, grey)]
    assert torch.equal(ours[0][:3], torch.full((3, 8, 8), -1.0)) and ours[0][3].all()
    assert not ours[1].any()
    seen = modality.observe(torch.stack(ours))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[2], seen[1])


@pytest.mark.parametrize("channels", [1, 3])
def test_shown_it_is_transparent_in_the_hole(channels: int, tmp_path: Path) -> None:
    modality, value = masked_image(channels), values(1, channels)
    value[:, :-1] = ((value[:, :-1] + 1) * 127.5).round() / 127.5 - 1  # on the 8-bit grid
    value[:, :-1] *= value[:, -1:]
    (shown,) = modality.postprocess(value)
    assert shown.mode == {1: "LA", 3: "RGBA"}[channels]
    assert np.array_equal(np.asarray(shown)[..., -1], (value[0, -1] * 255).byte().numpy())
    shown.save(tmp_path / "shown.png")
    raw = modality.parse(str(tmp_path / "shown.png"))
    torch.testing.assert_close(modality.preprocess(raw), value[0], rtol=0, atol=1e-6)


def test_a_soft_edge_is_known_from_half_on() -> None:
    pixels = np.full((8, 8, 4), 200, np.uint8)
    pixels[0, :, 3] = [0, 1, 64, 127, 128, 129, 200, 255]
    assert masked_image().preprocess(PILImage.fromarray(pixels))[3, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_resizing_keeps_the_edges_of_a_hole() -> None:
    doubled = PILImage.fromarray(PIXELS.repeat(2, 0).repeat(2, 1))
    modality = masked_image(resize=True)
    known = modality.preprocess(doubled)[-1]
    assert torch.equal(known, modality.preprocess(PILImage.fromarray(PIXELS))[-1])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_resizing_takes_nothing_out_of_the_hole(mode: str) -> None:
    """Were alpha no weight, the black in the hole would darken its rim; were weights negative, it would brighten it."""
    pixels = np.full((40, 60, len(mode)), 200, np.uint8)
    pixels[..., -1] = np.where(np.indices((40, 60)).sum(0) % 17 < 6, 0, 255)
    pixels[..., :-1] *= pixels[..., -1:] > 0
    value = masked_image(len(mode) - 1, resize=True).preprocess(PILImage.fromarray(pixels, mode))
    known = value[-1] > 0
    assert 10 < int(known.sum()) < 64
    assert (value[:-1, known] - (200 / 127.5 - 1)).abs().max() < 3 / 127.5


# ----------------------------------------------------------------------------------------------------- files


def write(folder: Path) -> np.ndarray:
    """photo.png (RGB, 24x16), its mask, and files that do not go with it; the photo's pixels."""
    pixels = np.random.default_rng(1).integers(256, size=(16, 24, 3), dtype=np.uint8)
    hole = np.full((16, 24), 255, np.uint8)
    hole[4:12, 8:16] = 0
    PILImage.fromarray(pixels).save(folder / "photo.png")
    PILImage.fromarray(pixels[..., 0]).save(folder / "grey.png")
    PILImage.fromarray(hole).save(folder / "mask.png")
    PILImage.fromarray(hole > 0).save(folder / "bits.png")
    PILImage.fromarray(hole // 255).save(folder / "ones.png")
    PILImage.fromarray(hole).convert("RGBA").save(folder / "alpha.png")
    PILImage.fromarray(hole[:8, :8]).save(folder / "small.png")
    (folder / "text.png").write_text("no image")
    return pixels


@pytest.mark.parametrize("mask", ["mask.png", "bits.png"])
def test_a_photo_and_a_mask_are_two_files(mask: str, tmp_path: Path) -> None:
    pixels = write(tmp_path)
    modality = MaskedImage(Shape((3, 16, 24), 4, 4), channels=3, size=(16, 24))
    value = modality.preprocess(modality.parse(f"{tmp_path / 'photo.png'}@{tmp_path / mask}"))
    known = np.ones((16, 24), bool)
    known[4:12, 8:16] = False
    assert np.array_equal(value[-1].numpy() > 0, known)
    assert np.array_equal(((value[:-1, known] + 1) * 127.5).round().numpy(), pixels[known].T)


def test_a_photo_of_another_size_is_cut_to_its_centre_with_its_mask(tmp_path: Path) -> None:
    write(tmp_path)
    value = masked_image().preprocess(masked_image().parse(f"{tmp_path / 'photo.png'}@{tmp_path / 'mask.png'}"))
    assert value[-1].nonzero().tolist() == [
        [r, c] for r in range(8) for c in range(8) if not (2 <= r < 6 and 2 <= c < 6)
    ]


def test_what_is_transparent_in_the_photo_is_unknown_beside_the_mask(tmp_path: Path) -> None:
    PILImage.fromarray(PIXELS).save(tmp_path / "photo@2x.png")
    mask = np.full((8, 8), 255, np.uint8)
    mask[:4] = 0
    PILImage.fromarray(mask).save(tmp_path / "mask.png")
    alone, both = (
        masked_image().preprocess(masked_image().parse(text))
        for text in (f"{tmp_path / 'photo@2x.png'}", f"{tmp_path / 'photo@2x.png'}@{tmp_path / 'mask.png'}")
    )
    assert torch.equal(alone, masked_image().preprocess(PILImage.fromarray(PIXELS)))
    assert torch.equal(both[:, 4:], alone[:, 4:]) and not both[:, :4].any() and alone[:, :4].any()


@pytest.mark.parametrize(
    ("text", "complaint"),
    {
        "photo.png": "'photo.png': has no alpha channel that says where it is known; write photo.png@mask.png, bl",
        "photo.png@": "'photo.png@': names no file after the @; write photo.png@mask.png",
        "@mask.png": "'': no such file",
        "photo.png@nowhere.png": "'nowhere.png': no such file",
        "nowhere.png@mask.png": "'nowhere.png': no such file",
        "nowhere.png": "'nowhere.png': no such file",
        "text.png@mask.png": "'text.png': cannot be read as an image: ",
        "photo.png@text.png": "'text.png': cannot be read as an image: ",
        "photo.png@small.png": "'photo.png@small.png': the photo and its mask need one size, they have 24x16 and 8x8",
        "photo.png@ones.png": "'photo.png@ones.png': the mask hides every pixel: white (255) is known, black (0) is",
    }.items(),
)
def test_files_that_do_not_fit_are_refused_in_one_line(
    text: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    with pytest.raises(InputError) as caught:
        masked_image().parse(text)
    assert str(caught.value).startswith(f"masked_image = {complaint}")
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------- encoding and likelihood


def test_the_encoding_is_the_known_pixels_and_what_hides_in_the_hole_has_no_effect() -> None:
    modality, value = masked_image(), values()
    assert torch.equal(modality.encode(value), value[:, :3])
    assert torch.equal(modality.observe(value), value)
    secret = value.clone()
    secret[:, :3] += 5 * (1 - secret[:, 3:])
    assert torch.equal(modality.encode(secret), modality.encode(value))
    assert torch.equal(modality.observe(secret), modality.observe(value))


def test_the_likelihood_counts_the_hole_only_and_asks_for_the_anchor() -> None:
    modality, value = masked_image(), values()
    anchor = torch.rand(2, 3, 8, 8, generator=Generator().manual_seed(1)) * 2 - 1
    target = modality.target(value, anchor)
    assert torch.equal(target[:, :3], anchor) and torch.equal(target[:, 3], value[:, 3])
    params = torch.randn(2, 4, 8, 8, generator=Generator().manual_seed(2))
    log_prob = Normal(params[:, :3], params[:, 3:].exp()).log_prob(anchor).sum(dim=1)  # (B, 8, 8)
    expected = torch.stack([-log_prob[k][value[k, 3] == 0].sum() for k in range(2)])
    torch.testing.assert_close(modality.nll(params, target) * modality.dimensions, expected)
    other = anchor + 3 * value[:, 3:]  # known pixels do not count
    assert torch.equal(modality.nll(params, modality.target(value, other)), modality.nll(params, target))


def test_it_is_never_aggregated_and_reads_the_anchor() -> None:
    modality, params = masked_image(), torch.randn(2, 4, 8, 8)
    assert not modality.aggregable and isinstance(modality, FillsAnchor)
    assert torch.equal(modality.anchor_mode(params), params[:, :3])
    assert torch.equal(modality.mode(params)[:, :3], params[:, :3]) and modality.mode(params)[:, 3].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_restoring_pastes_known_pixels_bit_for_bit(dtype: torch.dtype) -> None:
    value, anchor = values(), torch.randn(2, 3, 8, 8, generator=Generator().manual_seed(1)).to(dtype)
    restored = masked_image().paste(anchor, value)
    known = (value[:, 3:] > 0).expand(-1, 3, -1, -1)
    assert restored.dtype == dtype
    assert torch.equal(restored[known], value[:, :3][known].to(dtype))
    assert torch.equal(restored[~known], anchor[~known])


# ------------------------------------------------------------------------------------------------------------ sampling


@pytest.fixture(scope="module")
def pipe() -> MTDiffusionPipeline:
    """An untrained model of image and masked image."""
    torch.manual_seed(0)
    model = MTDiffusionModel(
        modality_config={
            "image": {"kind": "image", "channels": 3, "size": 8},
            "masked": {"kind": "masked_image", "channels": 3, "size": 8},
        },
        backbone_config={"kind": "unet", **LAYERS},
    )
    pipeline = MTDiffusionPipeline(model=model.eval(), scheduler=MTDiffusionScheduler(num_train_timesteps=20))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("steps", [3, 0])
@pytest.mark.parametrize("kind", ["tensor", "picture"])
def test_known_pixels_come_back_and_the_hole_is_filled(pipe: MTDiffusionPipeline, steps: int, kind: str) -> None:
    value = values() if kind == "tensor" else pipe.model.modalities["masked"].preprocess(PILImage.fromarray(PIXELS))
    given = value if kind == "tensor" else PILImage.fromarray(PIXELS)
    samples = pipe(
        observed={"masked": given}, num_inference_steps=steps, output_type="pt", generator=Generator().manual_seed(0)
    ).samples
    value = value.reshape(-1, 4, 8, 8)
    known = (value[:, 3:] > 0).expand(-1, 3, -1, -1)
    assert torch.equal(samples["image"][known], value[:, :3][known])
    assert not (samples["image"][~known] == 0).any()
    assert torch.equal(samples["masked"], value)


def test_without_denoising_the_hole_is_the_heads_mean(pipe: MTDiffusionPipeline) -> None:
    """Read in one evaluation at t = T, of z_T's mean 0."""
    value = values()
    z, everywhere = torch.zeros(2, 3, 8, 8), torch.ones(2, dtype=torch.bool)
    with torch.no_grad():
        seen = pipe.model.observation({"masked": value}, {}, {"masked": everywhere}, like=z)
        params = pipe.model(z, torch.full((2,), 19), seen).params["masked"]
    expected = torch.where(value[:, 3:] > 0, value[:, :3], params[:, :3])
    found = pipe(observed={"masked": value}, num_inference_steps=0, output_type="pt").samples["image"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_pictures_keep_their_known_pixels(pipe: MTDiffusionPipeline) -> None:
    (image,) = pipe(observed={"masked": PILImage.fromarray(PIXELS)}, num_inference_steps=2).samples["image"]
    known = PIXELS[..., 3] == 255
    assert np.array_equal(np.asarray(image)[known], PIXELS[known][:, :3])


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (PILImage.new("RGB", (8, 8)), "masked_image = 'RGB': has no alpha channel; it must be"),
        (PILImage.new("RGBA", (9, 8)), "masked_image = '9x8': expected 8x8; or set resize: true"),
        ("cat.png", "masked_image = 'str': is no image; check data.columns"),
        (None, "masked_image = 'NoneType': is no image; check data.columns"),
    ],
)
def test_unusable_values_are_refused_in_one_line(raw: Any, text: str) -> None:
    with pytest.raises(InputError) as caught:
        masked_image().preprocess(raw)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_a_batch_whose_last_channel_is_no_hole_is_refused() -> None:
    value = values()
    value[1, 3, 0, 0] = 0.5
    with pytest.raises(InputError, match="masked_image = 'its last channel': must be 1 where a pixel is known and 0"):
        masked_image().check(value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"channels": 2}, "channels = 2: an image has 1 (grey) or 3 (RGB) channels"),
        ({"size": 9}, "size = (9, 9): must be a whole multiple or a divisor"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        masked_image(**settings)
    assert str(caught.value).startswith(text)


def test_size_and_channels_are_the_anchors() -> None:
    anchor = {"channels": 3, "size": [8, 8], "scale": 2.0}
    assert MaskedImage.settings_from_anchor(**anchor) == {"channels": 3, "size": [8, 8]}
