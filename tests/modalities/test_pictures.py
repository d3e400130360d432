"""Whatever Pillow opens becomes what the config asks for, by every way in."""

from __future__ import annotations

import io
import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from PIL import ImageOps

from mmdiff.errors import InputError
from mmdiff.modalities import Image, ImageSet, Mask, MaskedImage, Shape
from mmdiff.modalities.pictures import resized

SIDE = 8
BACKGROUND = (10, 200, 30)
MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "RGBa",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I;16",
    "I;16L",
    "I;16B",
    "I;16N",
    "I",
    "F",
)
ORDERS = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I;16N": "=u2", "I": "=i4"}  # of the bytes of wide numbers


def modality(channels: int, **settings: Any) -> Image:
    return Image(Shape((channels, SIDE, SIDE), 4, 4), channels=channels, size=SIDE, **settings)


def picture(mode: str) -> PILImage.Image:
    """Random numbers over the mode's whole range."""
    random = np.random.default_rng(0)
    if mode in ORDERS:
        numbers = random.integers(0, 65536, (SIDE, SIDE))
        return PILImage.frombytes(mode, (SIDE, SIDE), numbers.astype(ORDERS[mode]).tobytes())
    if mode == "F":
        return PILImage.fromarray(random.random((SIDE, SIDE), dtype=np.float32))
    if mode == "LAB":
        return PILImage.merge("LAB", [PILImage.fromarray(random.integers(0, 256, (SIDE, SIDE), np.uint8))] * 3)
    rgba = PILImage.fromarray(random.integers(0, 256, (SIDE, SIDE, 4), np.uint8))
    if mode == "PA":
        return rgba.convert("RGB").convert("P").convert("PA")
    if mode in ("LA", "La"):
        grey = rgba.convert("LA")
        return grey if mode == "LA" else grey.convert("La")
    return rgba.convert(mode) if mode in ("RGBA", "RGBa") else rgba.convert("RGB").convert(mode)


def reference(image: PILImage.Image, channels: int) -> np.ndarray:
    """The value by numpy alone: (channels, h, w) in [−1, 1], composited over `BACKGROUND`."""
    if image.mode in ORDERS:
        numbers = np.frombuffer(image.tobytes(), ORDERS[image.mode]).reshape(SIDE, SIDE)
        return np.stack([numbers.astype(np.float64) / 65535] * channels) * 2 - 1
    if image.mode == "F":
        return np.stack([np.asarray(image, np.float64)] * channels) * 2 - 1
    if image.mode == "LAB":
        pytest.skip("its colours are a colour profile's: see the law of greys")
    plain = image.convert("LA") if image.mode == "La" else image
    rgba = np.asarray(plain.convert("RGBA"), np.float64)
    alpha = rgba[..., 3:] / 255
    rgb = rgba[..., :3] * alpha + np.array(BACKGROUND) * (1 - alpha)
    if channels == 1:
        rgb = rgb @ np.array([0.299, 0.587, 0.114])[:, None]
    return rgb.transpose(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_converted_and_composited(mode: str, channels: int) -> None:
    raw = picture(mode)
    value = modality(channels, background=BACKGROUND).preprocess(raw)
    two_levels = 2.01 * 2 / 255  # compositing and the grey of a colour round to 8 bits
    np.testing.assert_allclose(value.numpy(), reference(raw, channels), rtol=0, atol=two_levels)
    assert (value.abs() <= 1).all()


def test_a_grey_of_lab_is_grey() -> None:
    raw = PILImage.merge("LAB", [PILImage.new("L", (SIDE, SIDE), level) for level in (128, 128, 128)])
    red, green, blue = modality(3).preprocess(raw)[:, 0, 0].tolist()
    assert max(red, green, blue) - min(red, green, blue) < 0.05 and -0.5 < red < 0.5


@pytest.mark.parametrize("mode", ORDERS)
def test_wide_numbers_are_masks_and_pictures_of_every_size(mode: str) -> None:
    numbers = np.random.default_rng(0).integers(0, 2, (2 * SIDE, 2 * SIDE)).repeat(2, axis=0)[: 2 * SIDE] * 300
    raw = PILImage.frombytes(mode, numbers.shape, numbers.astype(ORDERS[mode]).tobytes())
    same = PILImage.fromarray((numbers / 65535).astype(np.float32))
    torch.testing.assert_close(modality(1, resize=True).preprocess(raw), modality(1, resize=True).preprocess(same))
    mask = Mask(Shape((3, SIDE, SIDE), 4, 4), 2, 2 * SIDE, values=[0, 300])
    assert np.array_equal(mask.preprocess(raw).numpy(), numbers // 300)
    assert Image.settings_from_data(None, [raw]) == {"channels": 1, "size": [2 * SIDE, 2 * SIDE]}


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_of_either_byte_order(order: str, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE))
    tags = [(256, SIDE), (257, SIDE), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, SIDE), (279, 128)]
    pixels = numbers.astype(f"{order}u2").tobytes()
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(pixels))
    fields = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    (tmp_path / "a.tiff").write_bytes(head + pixels + struct.pack(f"{order}H", len(tags)) + fields + bytes(4))
    value = modality(1).preprocess({"bytes": None, "path": str(tmp_path / "a.tiff")})
    np.testing.assert_allclose(value[0].numpy(), numbers / 65535 * 2 - 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 0, 0)])
def test_what_lies_under_transparent_pixels_is_never_seen(hidden: tuple[int, int, int]) -> None:
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[..., :3] = hidden
    raw = PILImage.fromarray(pixels)
    assert torch.equal(modality(3).preprocess(raw), torch.ones(3, SIDE, SIDE))  # the default background is white
    grown = PILImage.fromarray(np.kron(pixels, np.ones((2, 2, 1), np.uint8)))
    assert torch.equal(modality(3, resize=True).preprocess(grown), torch.ones(3, SIDE, SIDE))


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_of_a_png_counts(mode: str) -> None:
    file = io.BytesIO()
    transparency = {"P": 0, "L": 0, "RGB": (0, 0, 0)}[mode]
    PILImage.new(mode, (SIDE, SIDE), 0).save(file, "PNG", transparency=transparency)
    raw = {"bytes": file.getvalue(), "path": None}
    assert torch.equal(modality(3).preprocess(raw), torch.ones(3, SIDE, SIDE))


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_sixteen_bits_survive_files_and_resizing(mode: str, tmp_path: Path) -> None:
    raw = picture(mode)
    path = tmp_path / f"deep.{'png' if mode == 'I;16' else 'tiff'}"
    raw.save(path)
    own = modality(1)
    value = own.preprocess(raw)
    assert len(value.unique()) > SIDE * SIDE - 3  # 8 bits would merge some
    assert torch.equal(own.preprocess(own.parse(str(path))), value)
    grown = PILImage.fromarray(np.kron(np.asarray(raw), np.ones((2, 2), np.asarray(raw).dtype)))
    grown.save(path)
    resizing = modality(1, resize=True)
    assert torch.equal(resizing.preprocess(grown), resizing.preprocess(resizing.parse(str(path))))


# --------------------------------------------------------------------------------------------------------------- EXIF


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_obeyed_by_every_way_in(orientation: int, kind: str, tmp_path: Path) -> None:
    stored = PILImage.fromarray(np.kron([[0, 80, 160], [200, 40, 255]], np.ones((16, 16))).astype(np.uint8))
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{kind.lower()}"
    stored.save(path, kind, exif=exif, **({} if kind == "TIFF" else {"quality": 100}))
    turns = PILImage.fromarray(np.asarray(stored))
    turns.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(turns)
    own = Image(Shape((1, upright.height, upright.width), 4, 4), 1, [upright.height, upright.width])
    expected = own.preprocess(upright)
    stored_file = {"bytes": path.read_bytes(), "path": None}
    ways = [PILImage.open(path), stored_file, {"bytes": None, "path": str(path)}, own.parse(str(path))]
    one_level = 4.01 / 255  # of JPEG and WEBP
    assert all((own.preprocess(raw) - expected).abs().max() <= one_level for raw in ways)
    size = Image.settings_from_data(None, [stored_file])["size"]
    assert size == [upright.height, upright.width]
    assert torch.equal(own.preprocess(np.asarray(upright)), expected)


# ----------------------------------------------------------------------------------------------- settings of a column


@pytest.mark.parametrize(
    ("modes", "channels"), [(("L", "1", "LA", "I;16"), 1), (("L", "RGB"), 3), (("L", "L", "P"), 3), (("CMYK",), 3)]
)
def test_channels_are_read_from_the_whole_column(modes: tuple[str, ...], channels: int) -> None:
    raws = [None, *map(picture, modes)]
    assert Image.settings_from_data(None, raws) == {"channels": channels, "size": [SIDE, SIDE]}
    sets = ImageSet.settings_from_data(None, [raws[1:], None])
    assert sets == {"channels": channels, "size": [SIDE, SIDE], "max_images": len(modes)}


def test_several_sizes_are_refused_with_two_of_them() -> None:
    raws = [PILImage.new("L", size) for size in ((8, 8), (9, 7), (8, 8))]
    with pytest.raises(InputError, match="9x7.*8x8.*resize: true"):
        Image.settings_from_data(None, raws)
    assert Image.settings_from_data(None, raws, size=8) == {"channels": 1}


@pytest.mark.parametrize("background", [-1, 256, [0, 0], [0, 0, 300], 0.5])
def test_a_background_is_a_colour(background: Any) -> None:
    with pytest.raises(InputError, match="^background = "):
        modality(3, background=background)


# --------------------------------------------------------------------------------------------------------- unreadable


def jpeg() -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def enormous() -> bytes:
    file = io.BytesIO()
    PILImage.new("1", (20000, 10000)).save(file, "PNG")
    return file.getvalue()


BROKEN = {
    "truncated": jpeg()[:700],
    "empty": b"",
    "text": b"hello",
    "half a PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "above Pillow's limit": enormous(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_one_line_with_the_file(name: str) -> None:
    masked = MaskedImage(Shape((3, SIDE, SIDE), 4, 4), 3, SIDE, resize=True)
    for own in (modality(3, resize=True), masked):
        with pytest.raises(InputError, match="photo.jpg.*cannot be read") as caught:
            own.preprocess({"bytes": BROKEN[name], "path": "photo.jpg"})
        assert "\n" not in str(caught.value) and "0x" not in str(caught.value)
    with pytest.raises(InputError, match="nowhere.png"):
        modality(3).preprocess({"bytes": None, "path": "nowhere.png"})


FORMATS = {
    **dict.fromkeys(("PNG", "TIFF"), ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "P", "RGB"),
    "GIF": ("L", "P"),
    "JPEG2000": ("L", "RGBA"),
    "PPM": ("L", "RGB"),
    "TGA": ("L", "RGBA"),
    "ICO": ("RGBA",),
}


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """Cut off, or with some bytes changed."""
    if random.random() < 0.3:
        return data[: random.integers(len(data))]
    changed = np.frombuffer(data, np.uint8).copy()
    reach = len(data) if random.random() < 0.5 else min(len(data), 200)  # where the headers are
    changed[random.integers(reach, size=random.integers(1, 6))] = random.integers(256)
    return changed.tobytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_an_image_or_one_line(kind: str) -> None:
    random, own, outcomes = np.random.default_rng(0), modality(3, resize=True), set()
    masked = MaskedImage(Shape((3, SIDE, SIDE), 4, 4), 3, SIDE, resize=True)
    for mode in FORMATS[kind]:
        file = io.BytesIO()
        exif = {"exif": turned(6)} if kind in ("PNG", "TIFF", "JPEG", "WEBP") else {}
        picture(mode).resize((16, 16), PILImage.Resampling.NEAREST).save(file, kind, **exif)
        own.preprocess({"bytes": file.getvalue(), "path": "whole"})
        for _ in range(40):
            raw = {"bytes": damaged(file.getvalue(), random), "path": "photo.any"}
            for read in (own.preprocess, masked.preprocess, lambda r: Image.settings_from_data(None, [r])):
                try:
                    read(raw)
                    outcomes.add("read")
                except InputError as error:
                    assert "\n" not in str(error)
                    outcomes.add("refused")
    assert "refused" in outcomes


def turned(orientation: int) -> PILImage.Exif:
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    return exif


def test_a_cut_tiff_is_named_while_settings_are_read() -> None:
    file = io.BytesIO()
    picture("RGB").resize((64, 64)).save(file, "TIFF")  # its header comes first
    raw = {"bytes": file.getvalue()[:-2000], "path": "scan.tiff"}
    for read in (Image.check_readable, lambda r: Image.settings_from_data(None, [r])):
        with pytest.raises(InputError, match="scan.tiff.*cannot be read"):
            read(raw)


# ------------------------------------------------------------------------------------------- transparency of 16 bits


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("background", [0, 255, BACKGROUND])
def test_the_transparent_number_of_16_bits_counts(background: Any, channels: int) -> None:
    numbers = np.full((SIDE, SIDE), 1000, np.uint16)
    numbers[:4] = 1001
    file = io.BytesIO()
    PILImage.fromarray(numbers).save(file, "PNG", transparency=1001)
    raw = {"bytes": file.getvalue(), "path": None}
    value = modality(channels, background=background).preprocess(raw)
    rgb = torch.tensor(background if isinstance(background, tuple) else (background,) * 3) / 127.5 - 1
    shown = rgb if channels == 3 else (rgb @ torch.tensor([0.299, 0.587, 0.114]))[None]
    torch.testing.assert_close(value[:, 0, 0], shown, rtol=0, atol=0.006)
    torch.testing.assert_close(value[:, -1, 0], torch.full((channels,), 2000 / 65535 - 1), rtol=0, atol=0.006)
    masked = MaskedImage(Shape((channels, SIDE, SIDE), 4, 4), channels, SIDE).preprocess(raw)
    assert torch.equal(masked[-1], torch.from_numpy((numbers == 1000).astype(np.float32)))


# ------------------------------------------------------------------------------------------------------------- arrays


def test_an_array_of_one_channel_is_grey() -> None:
    array = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)
    assert torch.equal(modality(3).preprocess(array[..., None]), modality(3).preprocess(array))
    assert Image.settings_from_data(None, [array[..., None]]) == {"channels": 1, "size": [SIDE, SIDE]}


@pytest.mark.parametrize("shape", [(), (8,), (8, 8, 0), (8, 8, 5), (3, 8, 9), (0, 8), (8, 0, 3), (1, 8, 8, 3)])
def test_arrays_that_are_no_image_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"array \(.*is no image"):
        modality(3, resize=True).preprocess(np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match="float32.*is no image"):
        modality(3, resize=True).preprocess(np.zeros((SIDE, SIDE), np.float32))


def test_nested_lists_of_bytes_are_arrays() -> None:
    array = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    assert torch.equal(modality(3).preprocess(array.tolist()), modality(3).preprocess(array))
    assert Image.settings_from_data(None, [array.tolist()]) == {"channels": 3, "size": [SIDE, SIDE]}


@pytest.mark.parametrize("raw", [[[0.5]], [[256]], [[-1]], [[1], [1, 2]], [], [["a"]], [[True]], [1, 2]])
def test_lists_that_are_no_image_are_refused(raw: Any) -> None:
    with pytest.raises(InputError, match="is no image"):
        modality(3, resize=True).preprocess(raw)


def test_an_image_of_any_size_is_brought_to_any_other() -> None:
    """Floating-point numbers round the crop to a hair outside the image, for one pair of sizes in a hundred."""
    for width, height in itertools.product((13, 20, 28, 36), repeat=2):
        for side, other in itertools.product(range(19, 60, 2), repeat=2):
            assert resized(PILImage.new("L", (side, other)), width, height).size == (width, height)
