"""Images: what is refused, in which words, and how other sizes are brought to size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mmdiff.errors import InputError
from mmdiff.modalities import Image, Shape


def image(channels: int = 1, height: int = 8, width: int = 8, **settings: Any) -> Image:
    return Image(Shape((channels, height, width), 4, 4), channels=channels, size=[height, width], **settings)


def picture(width: int, height: int, mode: str = "L") -> PILImage.Image:
    """Random pixels. PIL's sizes are (width, height)."""
    shape = (height, width) if mode == "L" else (height, width, 3)
    return PILImage.fromarray(np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize(
    ("raw", "value", "remedy"),
    [
        (picture(9, 8), "9x8", "expected 8x8; or set resize: true"),
        ("cat.png", "str", "is no image; check data.columns"),
        (None, "NoneType", "is no image"),
        (np.zeros((8, 8)), "array (8, 8) of float64", "is no image"),
    ],
)
def test_unusable_values_are_refused_in_one_line(raw: Any, value: str, remedy: str) -> None:
    with pytest.raises(InputError) as caught:
        image().preprocess(raw)
    assert str(caught.value).startswith(f"image = '{value}': ")
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"channels": 2, "size": 8}, "channels = 2: an image has 1"),
        ({"channels": 1, "size": 9}, "size = (9, 9): must be a whole multiple or a divisor of the grid (8, 8)"),
        ({"channels": 1, "size": [8, 16]}, "size = (8, 16): must be a whole multiple or a divisor"),
        ({"channels": 1, "size": [8, 8, 1]}, "size = [8, 8, 1]: needs one number, or height and width"),
        ({"channels": 1, "size": 8, "space": "latent"}, "space = 'latent': only the anchor is diffused in a latent"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        Image(Shape((1, 8, 8), 4, 4), **settings)
    assert text in str(caught.value)


@pytest.mark.parametrize(("width", "height", "left", "top"), [(14, 8, 3, 0), (8, 12, 0, 2)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_resize_takes_the_centre(width: int, height: int, left: int, top: int, mode: str) -> None:
    """Where the crop has the wanted size already nothing is interpolated."""
    raw, modality = picture(width, height, mode), image(3 if mode == "RGB" else 1, resize=True)
    (back,) = modality.postprocess(modality.preprocess(raw)[None])
    assert back.tobytes() == raw.crop((left, top, left + 8, top + 8)).tobytes()


@pytest.mark.parametrize(("height", "width"), [(4, 8), (8, 4)])
def test_heights_and_widths_are_not_confused(height: int, width: int) -> None:
    modality = image(1, height, width)
    raw = picture(width, height)
    assert modality.preprocess(raw).shape == (1, height, width)
    assert modality.postprocess(modality.preprocess(raw)[None]) == [raw]
    with pytest.raises(InputError, match=f"expected {width}x{height}"):
        modality.preprocess(picture(height, width))
    assert Image.diffusion_space(channels=1, size=[height, width], scale=1.0) == (1, height, width)


def test_pixels_span_minus_one_to_one() -> None:
    raw = PILImage.fromarray(np.array([[0, 255]] * 2, dtype=np.uint8))
    assert image(1, 2, 2).preprocess(raw).tolist() == [[[-1.0, 1.0], [-1.0, 1.0]]]


@pytest.mark.parametrize(("mode", "shades"), [("1", [0, 255]), ("L", [0, 128, 255]), ("I;16", [0, 2**15, 2**16 - 1])])
def test_every_grey_mode_spans_black_to_white(mode: str, shades: list[int]) -> None:
    raw = PILImage.new(mode, (len(shades), 1))
    for x, shade in enumerate(shades):
        raw.putpixel((x, 0), shade)
    value = image(1, 1, len(shades)).preprocess(raw)[0, 0]
    one_level = 2 / 255  # of 8 bits
    torch.testing.assert_close(value, 2 * torch.tensor(shades) / shades[-1] - 1, rtol=0, atol=one_level)


@pytest.mark.parametrize(
    "raw",
    [
        PILImage.fromarray(np.full((8, 8), 70000, np.int32)),
        PILImage.fromarray(np.full((8, 8), -1, np.int32)),
        PILImage.fromarray(np.full((8, 8), 1.5, np.float32)),
        PILImage.fromarray(np.full((8, 8), np.nan, np.float32)),
    ],
)
def test_numbers_without_a_range_are_refused(raw: PILImage.Image) -> None:
    """What their white is nobody knows; PIL would cut them off at 255."""
    with pytest.raises(InputError, match="no known range"):
        image().preprocess(raw)


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_unencode_undoes_encode(scale: float) -> None:
    modality = image(scale=scale)
    value = modality.preprocess(picture(8, 8))[None]
    torch.testing.assert_close(modality.encode(value), scale * value, rtol=1e-6, atol=0)
    torch.testing.assert_close(modality.unencode(modality.encode(value)), value, rtol=1e-6, atol=0)


def test_values_outside_the_range_are_clipped_for_display() -> None:
    """The input 2 is white and −2 black, without wrapping around in 8 bits."""
    (shown,) = image(1, 1, 2).postprocess(torch.tensor([[[[2.0, -2.0]]]]))
    assert np.asarray(shown).tolist() == [[255, 0]]


def test_a_column_without_images_is_refused() -> None:
    with pytest.raises(InputError, match="image = 'int': is no image"):
        Image.settings_from_data(None, [None, 3])


def test_an_anchor_has_no_parameters() -> None:
    assert not list(image(head=False).parameters())
