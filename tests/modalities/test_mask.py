"""Masks: what an ignored pixel means, which files hold ids, how sizes meet, and what is refused in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.modalities import Mask, Shape
from mmdiff.modalities.contract import check_modality

SHAPE = Shape((2, 8, 8), 4, 4)
IDS = np.random.default_rng(0).integers(5, size=(8, 8))


def mask(shape: Shape = SHAPE, **settings: Any) -> Mask:
    torch.manual_seed(0)
    return Mask(shape, **{"num_classes": 5, "size": 8, **settings})


def picture(ids: np.ndarray, mode: str = "L") -> PILImage.Image:
    image = PILImage.fromarray(ids.astype(np.uint8))
    if mode == "P":
        image.putpalette([255 - k // 3 for k in range(768)])  # colours that have nothing to do with the ids
        assert image.mode == "P"
    return image


def coloured() -> PILImage.Image:
    """Half of it of one colour, half of another."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4, :, 0], pixels[4:, :, 1] = 9, 9
    return PILImage.fromarray(pixels)


def half_ignored(ignore: int = 255) -> Tensor:
    value = torch.from_numpy(IDS).clone()
    value[:, 4:] = ignore
    return value[None]


# ------------------------------------------------------------------------------------------------- ignored pixels


@pytest.mark.parametrize("ignore", [255, 5])
def test_ignored_pixels_are_zero_in_the_encoding_and_in_what_is_observed(ignore: int) -> None:
    modality = mask(ignore=ignore)
    full, half = torch.from_numpy(IDS)[None], half_ignored(ignore)
    for map_ in (modality.encode, modality.observe):
        assert not map_(half)[..., 4:].any()
        assert torch.equal(map_(half)[..., :4], map_(full)[..., :4])
    assert torch.equal(modality.observe(full)[0].argmax(dim=0), full[0])


def test_ignored_pixels_cost_nothing_and_are_not_left_out_of_the_mean() -> None:
    modality = mask()
    params = torch.randn(1, 5, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    nll = modality.nll(params, half_ignored())
    log_prob = params.log_softmax(dim=1)[0].gather(0, torch.from_numpy(IDS)[None])[0]  # (8, 8)
    torch.testing.assert_close(nll * modality.dimensions, -log_prob[:, :4].sum()[None])
    nll.sum().backward()
    assert not params.grad[..., 4:].any() and params.grad[..., :4].any()


def test_ignored_pixels_are_never_predicted() -> None:
    modality, params = mask(), torch.randn(50, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = modality.sample(params, torch.randn(50, 8, 8, generator=torch.Generator().manual_seed(1)))
    for ids in (drawn, modality.mode(params)):
        assert int(ids.min()) == 0 and int(ids.max()) == 4


def test_a_missing_mask_is_one_of_ignored_pixels() -> None:
    modality = mask()
    missing = modality.placeholder()[None]
    assert not modality.encode(missing).any()
    assert modality.nll(torch.randn(1, 5, 8, 8), missing).tolist() == [0.0]


# ----------------------------------------------------------------------------------------------------- raw values


@pytest.mark.parametrize(
    "raw",
    [
        *(picture(IDS), picture(IDS, "P"), IDS.tolist(), IDS, IDS.astype(np.uint8), IDS.astype(float).tolist()),
        PILImage.fromarray(IDS.astype("int32")),
    ],
    ids=["L", "P", "list", "int64", "uint8", "whole floats", "I"],
)
def test_ids_are_read_from_images_and_lists(raw: Any) -> None:
    assert torch.equal(mask().preprocess(raw), torch.from_numpy(IDS))


@pytest.mark.parametrize("mode", ["L", "P"])
def test_ids_survive_a_file(mode: str, tmp_path: Path) -> None:
    picture(IDS, mode).save(tmp_path / "ids.png")
    assert torch.equal(mask().preprocess(mask().parse(str(tmp_path / "ids.png"))), torch.from_numpy(IDS))


def test_a_shown_mask_holds_ids_and_distinct_colours(tmp_path: Path) -> None:
    modality = mask(num_classes=20)
    ids = torch.arange(64).reshape(1, 8, 8) % 20
    ids[0, 0, 0] = 255
    (shown,) = modality.postprocess(ids)
    assert shown.mode == "P"
    assert np.array_equal(np.asarray(shown), ids[0].numpy())
    shown.save(tmp_path / "shown.png")
    assert torch.equal(modality.preprocess(modality.parse(str(tmp_path / "shown.png"))), ids[0])
    colours = {k: shown.convert("RGB").getpixel((k % 8, k // 8)) for k in range(64)}
    assert colours[0] == (0, 0, 0)  # ignored
    classes = np.array([colours[k] for k in range(1, 21)], dtype=float)
    apart = np.linalg.norm(classes[:, None] - classes[None], axis=2) + 1e3 * np.eye(20)
    assert apart.min() > 20 and np.linalg.norm(classes, axis=1).min() > 60


def test_resizing_takes_the_centre_and_makes_no_new_ids() -> None:
    modality = mask(resize=True)
    wide = np.pad(IDS, ((0, 0), (3, 3)), constant_values=255)
    assert torch.equal(modality.preprocess(picture(wide)), torch.from_numpy(IDS))
    large = np.where(np.indices((37, 37)).sum(0) % 3 == 0, 4, 0)  # a mean of the two would be another class
    assert set(modality.preprocess(picture(large)).unique().tolist()) == {0, 4}
    doubled = IDS.repeat(2, 0).repeat(2, 1)
    assert torch.equal(modality.preprocess(picture(doubled)), torch.from_numpy(IDS))


@pytest.mark.parametrize(
    ("settings", "values", "found"),
    [
        ({}, [None, picture(IDS)], {"num_classes": 5, "size": [8, 8]}),
        ({}, [picture(half_ignored()[0].numpy()), IDS], {"num_classes": 5, "size": [8, 8]}),
        ({"ignore": 6}, [IDS, np.full((8, 8), 6)], {"num_classes": 5, "size": [8, 8]}),
        ({"num_classes": 9}, iter([IDS]), {"num_classes": 9, "size": [8, 8]}),
        ({"values": [0, 255], "size": 8}, [np.where(IDS > 2, 255, 0)], {"num_classes": 2}),
        ({"colors": [[9, 0, 0], [0, 9, 0]]}, [coloured()], {"num_classes": 2, "size": [8, 8]}),
        ({}, [IDS[:4]], {"num_classes": 5, "size": [4, 8]}),
    ],
)
def test_the_data_determine_size_and_classes(settings: dict, values: Any, found: dict) -> None:
    assert Mask.settings_from_data(None, values, **settings) == found


# -------------------------------------------------------------------------------------------------------- encoding


def test_a_class_is_one_vector_or_one_repeated_pattern() -> None:
    constant = torch.arange(5)[:, None, None].expand(5, 8, 8)
    vectors = mask().encode(constant)
    assert torch.equal(vectors, vectors[:, :, :1, :1].expand_as(vectors))
    patterns = mask(pattern_size=2).encode(constant)
    assert torch.equal(patterns, patterns[:, :, :2, :2].repeat(1, 1, 4, 4))
    assert not torch.equal(patterns, patterns[:, :, :1, :1].expand_as(patterns))
    for encoding in (vectors.detach(), patterns.detach()):
        torch.testing.assert_close(encoding.square().mean(dim=(1, 2, 3)), torch.ones(5))
        assert float(torch.pdist(encoding.flatten(1)).min()) > 0.3 * float(encoding[0].norm())  # classes keep apart


@pytest.mark.parametrize("growth", [1e-2, 1e3])
def test_a_growing_palette_encodes_the_same(growth: float) -> None:
    modality, value = mask(), torch.from_numpy(IDS)[None]
    before = modality.encode(value)
    with torch.no_grad():
        modality.palette *= growth
    torch.testing.assert_close(modality.encode(value), before, rtol=1e-4, atol=1e-5)


def test_a_pixel_that_covers_several_classes_is_their_mean() -> None:
    modality = mask(size=16)
    value = torch.from_numpy(np.random.default_rng(1).integers(5, size=(1, 16, 16)))
    one = mask(size=8)
    quarters = [one.encode(value[:, i::2, j::2]) for i in (0, 1) for j in (0, 1)]  # both have the same palette
    torch.testing.assert_close(modality.encode(value), sum(quarters) / 4)
    assert modality.observation_channels == 4 * 5  # while what is observed loses nothing
    assert int(modality.observe(value).sum()) == 16 * 16


@pytest.mark.parametrize("palette", ["learned", "fixed"])
def test_a_fixed_palette_is_saved_and_not_trained(palette: str) -> None:
    modality = mask(patterns=palette)
    assert modality.palette.requires_grad is (palette == "learned")
    assert "palette" in modality.state_dict()


def test_a_space_of_one_channel_takes_patterns() -> None:
    findings = check_modality(lambda shape: Mask(shape, 5, 8), Shape((1, 8, 8), 6, 10, 2))
    assert [finding for finding in findings if finding.fault] == []


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (picture(IDS + 1), "mask = 5: is no class and not ignore; found "),
        (IDS - 1, "mask = -1: is no class and not ignore; found "),
        (picture(IDS[:, :7]), "mask = '7x8': expected 8x8; or set resize: true"),
        (coloured(), "mask = 'RGB': is coloured: [0, 9, 0]: 50.0%, [9, 0, 0]: 50.0%; set colors, one RGB triple per "),
        (IDS + 0.5, "mask = 'ndarray': is no map of class ids; check data.columns"),
        (np.full((8, 8), np.inf), "mask = 'ndarray': is no map of class ids; check data.columns"),
        (3, "mask = 'int': is no map of class ids; check data.columns"),
        (None, "mask = 'NoneType': is no map of class ids"),
        ([1, 2, 3], "mask = 'list': is no map of class ids"),
        ([[1, 2], [3]], "mask = 'list': is no map of class ids"),
    ],
)
def test_unusable_values_are_refused_in_one_line(raw: Any, text: str) -> None:
    with pytest.raises(InputError) as caught:
        mask().preprocess(raw)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_batches_with_other_ids_are_refused() -> None:
    value = torch.from_numpy(IDS)[None].clone()
    mask().check(value)
    value[0, 0, 0] = 254
    with pytest.raises(InputError, match="mask = 254: is no class 0 … 4"):
        mask().check(value)


@pytest.mark.parametrize(
    ("shape", "settings", "text"),
    [
        (SHAPE, {"num_classes": 1}, "num_classes = 1: a mask needs two classes at least"),
        (SHAPE, {"ignore": 4}, "ignore = 4: must be an integer that is no class's own, or null"),
        (SHAPE, {"ignore": 2.5}, "ignore = 2.5: must be an integer"),
        (SHAPE, {"values": [0, 1, 2]}, "values = [0, 1, 2]: needs 5 entries"),
        (SHAPE, {"values": [0, 1, 2, 2, 3]}, "values = [0, 1, 2, 2, 3]: names something twice"),
        (SHAPE, {"names": ["a"]}, "names = ['a']: needs 5 entries"),
        (SHAPE, {"palette": [[0, 0, 300]] * 5}, "palette = "),
        (SHAPE, {"values": [0, 1, 2, 3, 4], "colors": [[0, 0, k] for k in range(5)]}, "values = "),
        (SHAPE, {"patterns": "random"}, "patterns = 'random': choose learned or fixed"),
        (SHAPE, {"pattern_size": 3}, "pattern_size = 3: must divide the diffusion space's 8x8"),
        (SHAPE, {"pattern_size": 0}, "pattern_size = 0: must divide"),
        (Shape((1, 8, 8), 4, 4), {"pattern_size": 1}, "pattern_size = 1: one channel holds only ±1; take 2 or more"),
        (SHAPE, {"size": 12}, "size = (12, 12): must be a whole multiple or a divisor of the grid (8, 8)"),
        (SHAPE, {"size": [8, 8, 8]}, "size = [8, 8, 8]: needs one number, or height and width"),
    ],
)
def test_impossible_settings_are_refused(shape: Shape, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        mask(shape, **settings)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("values", [[], [None], [np.full((8, 8), 255)]])
def test_a_column_without_ids_is_refused(values: list[Any]) -> None:
    with pytest.raises(InputError, match="mask = None: the column holds no class ids; check data.columns"):
        Mask.settings_from_data(None, values)


# ---------------------------------------------------------------------------------------- ids and colours of one's own

RAW = {
    "binary": ({"values": [0, 255]}, [0, 255]),
    "gaps": ({"values": [0, 1, 2, 4]}, [0, 1, 2, 4]),
    "descending": ({"values": [9, 3, 1]}, [9, 3, 1]),
    "large": ({"values": [0, 1000, 40000]}, [0, 1000, 40000]),
    "ignored": ({"values": [1, 2], "ignore": 0}, [1, 2, 0]),
    "negative ignore": ({"num_classes": 3, "ignore": -1}, [0, 1, 2, -1]),
    "far ignore": ({"num_classes": 3, "ignore": 1000}, [0, 1, 2, 1000]),
    "no ignore": ({"num_classes": 3, "ignore": None}, [0, 1, 2]),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_values_become_classes_and_come_back(name: str, tmp_path: Path) -> None:
    settings, raws = RAW[name]
    chosen = np.random.default_rng(0).integers(len(raws), size=(8, 8))
    raw = np.array(raws)[chosen]
    settings = {**settings, **Mask.settings_from_data(None, [raw], **settings)}
    torch.manual_seed(0)
    modality = Mask(SHAPE, **settings)
    classes = torch.from_numpy(chosen)
    expected = torch.where(classes < modality.num_classes, classes, modality.ignore)
    assert torch.equal(modality.preprocess(raw), expected)
    (shown,) = modality.postprocess(expected[None])
    path = modality.save(shown, tmp_path / "shown")
    assert torch.equal(modality.preprocess(modality.parse(str(path))), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_coloured_masks_are_read_by_their_colours(mode: str, tmp_path: Path) -> None:
    settings = {"colors": [[9, 0, 0], [0, 9, 0]], "ignore": [0, 0, 7]}
    pixels = np.asarray(coloured()).copy()
    pixels[0, 0] = [0, 0, 7]
    raw = PILImage.fromarray(pixels)
    raw = raw.quantize(3) if mode == "P" else raw.convert(mode)
    modality = Mask(SHAPE, **settings, **Mask.settings_from_data(None, [raw], **settings))
    value = modality.preprocess(raw)
    assert value[1:, 0].tolist() == [0] * 3 + [1] * 4 and value[0, 0] == modality.ignore
    (shown,) = modality.postprocess(value[None])
    assert np.array_equal(np.asarray(shown.convert("RGB")), pixels)
    assert torch.equal(modality.preprocess(modality.parse(str(modality.save(shown, tmp_path / "m")))), value)


def test_the_palette_of_an_indexed_image_is_kept() -> None:
    raw = picture(IDS, "P")
    settings = Mask.settings_from_data(None, [raw])
    (shown,) = Mask(SHAPE, **settings).postprocess(torch.from_numpy(IDS)[None])
    assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(raw.convert("RGB")))


@pytest.mark.parametrize("settings", [{}, {"num_classes": 2}])
def test_a_foreground_is_never_ignored_in_silence(settings: dict[str, Any]) -> None:
    """Masks of 0 and 255, the default `ignore`."""
    binary = np.where(IDS > 2, 255, 0)
    with pytest.raises(InputError, match=r"found .*255: .*values: \[0, 255\]"):
        Mask.settings_from_data(None, [binary], **settings)
    assert Mask.settings_from_data(None, [binary], num_classes=2, ignore=255)["num_classes"] == 2  # asked for


@pytest.mark.parametrize("ids", [[0, 1, 2, 4], [1, 2], [-1, 0, 1], [0, 128, 255]])
def test_values_that_fit_nothing_are_named_with_their_shares(ids: list[int]) -> None:
    with pytest.raises(InputError, match="found .*%.*set values"):
        Mask.settings_from_data(None, [np.resize(ids, (8, 8))])


def test_a_colour_without_a_class_is_named_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"'\[0, 9, 0\]': is no class.*add it to colors, or make it ignore"):
        Mask.settings_from_data(None, [coloured()], colors=[[9, 0, 0], [1, 1, 1]])


# ------------------------------------------------------------------------------------------------- as people store them


def test_transparent_pixels_of_a_mask_are_refused() -> None:
    grey = picture(np.zeros((8, 8), np.uint8))
    for mode in ("LA", "RGBA"):
        opaque = grey.convert(mode)
        assert torch.equal(mask().preprocess(opaque), torch.zeros(8, 8, dtype=torch.int64))
        opaque.putalpha(PILImage.fromarray(np.eye(8, dtype=np.uint8) * 255))
        with pytest.raises(InputError, match=f"mask = '{mode}': has transparent pixels"):
            mask().preprocess(opaque)


def test_floats_are_ids_where_they_are_whole() -> None:
    ids = np.arange(64, dtype=np.float32).reshape(8, 8) % 3
    assert np.array_equal(mask().preprocess(PILImage.fromarray(ids)).numpy(), ids)
    with pytest.raises(InputError, match="fractions"):
        mask().preprocess(PILImage.fromarray(ids + np.float32(0.5)))


def test_an_array_file_is_a_mask(tmp_path: Path) -> None:
    ids = np.arange(64).reshape(8, 8) % 3
    np.save(tmp_path / "m.npy", ids)
    for raw in (
        {"bytes": None, "path": str(tmp_path / "m.npy")},
        {"bytes": (tmp_path / "m.npy").read_bytes(), "path": "m.npy"},
    ):
        assert np.array_equal(mask().preprocess(raw).numpy(), ids)
        assert Mask.settings_from_data(None, [raw]) == {"num_classes": 3, "size": [8, 8]}
    np.save(tmp_path / "m.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(InputError, match="m.npy': cannot be read as .npy"):
        Mask.check_readable({"bytes": None, "path": str(tmp_path / "m.npy")})
