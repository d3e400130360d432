"""Dense maps: the units of the likelihood, what maps are read from, and what is refused in which words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Generator, Tensor

from mmdiff.errors import InputError
from mmdiff.modalities import Dense, Shape

SHAPE = Shape((2, 8, 8), 4, 4)
MAP = np.random.default_rng(0).normal(7.0, 3.0, size=(8, 8)).astype(np.float32)


def dense(channels: int = 1, shape: Shape = SHAPE, **settings: Any) -> Dense:
    torch.manual_seed(0)
    return Dense(shape, channels, **{"size": 8, "mean": 7.0, "std": 3.0, **settings})


def decoded(modality: Dense) -> Tensor:
    generator = Generator().manual_seed(0)
    return modality.decode(torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 4, generator=generator))


# --------------------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize("factor", [1e-3, 1000.0])
def test_in_other_units_the_density_is_stretched_and_all_else_the_same(factor: float) -> None:
    """Metres or millimetres: −log p changes by log of the factor per dimension."""
    metres, other = dense(), dense(mean=7.0 * factor, std=3.0 * factor)
    value = 7.0 + 3.0 * torch.randn(3, 1, 8, 8, generator=Generator().manual_seed(1))
    params = decoded(metres)
    assert torch.equal(decoded(other), params)
    torch.testing.assert_close(
        other.nll(params, value * factor), metres.nll(params, value) + math.log(factor), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(other.encode(value * factor), metres.encode(value), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.observe(value * factor), metres.observe(value), rtol=1e-3, atol=1e-4)
    noise = torch.randn(3, 1, 8, 8, generator=Generator().manual_seed(2))
    for ours, theirs in (
        (other.sample(params, noise), metres.sample(params, noise)),
        (other.mode(params), metres.mode(params)),
    ):
        torch.testing.assert_close(ours, factor * theirs, rtol=1e-4, atol=1e-5 * factor)


def test_a_missing_map_is_the_mean_of_the_data() -> None:
    modality = dense()
    assert modality.placeholder().unique().tolist() == [7.0]
    assert not modality.encode(modality.placeholder()[None]).any()


def test_a_finer_map_is_averaged_in_the_encoding_and_kept_in_the_observation() -> None:
    modality = dense(size=16)
    value = 7.0 + 3.0 * torch.randn(2, 1, 16, 16, generator=Generator().manual_seed(1))
    standardised = (value - 7.0) / 3.0
    means = sum(standardised[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    torch.testing.assert_close(modality.encode(value), means.expand(-1, 2, -1, -1))
    observed = modality.observe(value)
    assert observed.shape == (2, modality.observation_channels, 8, 8) == (2, 4, 8, 8)
    assert torch.equal(observed.flatten().sort().values, standardised.flatten().sort().values)


@pytest.mark.parametrize(("channels", "space"), [(3, 1), (3, 2), (2, 3), (3, 4), (5, 3), (1, 4)])
def test_any_number_of_channels_keeps_unit_variance(channels: int, space: int) -> None:
    modality = dense(channels, Shape((space, 8, 8), 4, 4))
    value = 7.0 + 3.0 * torch.randn(2000, channels, 8, 8, generator=Generator().manual_seed(1))
    square = modality.encode(value).square().mean(dim=(1, 2, 3))
    assert float(square.mean()) == pytest.approx(1.0, abs=4 * float(square.std()) / math.sqrt(2000))


# ---------------------------------------------------------------------------------------------------------- raw values


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (MAP, MAP[None]),
        (MAP[None], MAP[None]),
        (MAP.tolist(), MAP[None]),
        (MAP.astype(np.float64), MAP[None]),
        (PILImage.fromarray(MAP), MAP[None]),
        (PILImage.fromarray((MAP * 1000).astype(np.int32)), (MAP * 1000).astype(np.int32)[None]),
        (PILImage.fromarray((MAP * 1000).clip(0).astype(np.uint16)), (MAP * 1000).clip(0).astype(np.uint16)[None]),
    ],
    ids=["array", "one channel", "list", "float64", "F", "I", "I;16"],
)
def test_maps_are_read_in_their_own_units(raw: Any, expected: np.ndarray) -> None:
    value = dense().preprocess(raw)
    assert value.dtype == torch.float32
    assert np.array_equal(value.numpy(), expected.astype(np.float32))


def test_files_are_read_in_their_own_units(tmp_path: Path) -> None:
    depth = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    PILImage.fromarray(depth).save(tmp_path / "depth.png")
    np.save(tmp_path / "depth.npy", MAP)
    read = [dense().preprocess(dense().parse(str(tmp_path / name))) for name in ("depth.png", "depth.npy")]
    assert np.array_equal(read[0][0].numpy(), depth.astype(np.float32))
    assert np.array_equal(read[1][0].numpy(), MAP)


def test_what_is_shown_is_the_map() -> None:
    modality = dense()
    (shown,) = modality.postprocess(modality.preprocess(MAP)[None])
    assert shown.dtype == np.float32 and np.array_equal(shown, MAP[None])


def test_the_data_determine_size_and_statistics() -> None:
    maps = np.random.default_rng(1).normal(-4.0, 0.5, size=(20, 3, 8, 16)).astype(np.float32)
    settings = Dense.settings_from_data(None, [None, *maps.tolist(), None])
    assert (settings["channels"], settings["size"]) == (3, [8, 16])
    assert settings["mean"] == pytest.approx(maps.mean(), rel=1e-5)
    assert settings["std"] == pytest.approx(maps.std(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- refusals

WITH_NAN = np.where(np.eye(8) > 0, np.nan, MAP)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (WITH_NAN, "dense = 'a map': must be finite"),
        (np.where(np.eye(8) > 0, np.inf, MAP), "dense = 'a map': must be finite"),
        (MAP[:, :7], "dense = '7x8': expected 8x8; or set resize: true"),
        (np.zeros((3, 8, 8)), "dense = '3 channels': expected 1"),
        (np.zeros((8, 8, 3)), "dense = 'shape (8, 8, 3)': has its channels last"),
        (MAP > 0, "dense = 'ndarray': is no map of numbers (h, w) or (channels, h, w)"),
        ([["a"]], "dense = 'list': is no map of numbers"),
        ([1.0, 2.0], "dense = 'list': is no map of numbers"),
        (3.0, "dense = 'float': is no map of numbers"),
        (None, "dense = 'NoneType': is no map of numbers"),
        (PILImage.new("RGB", (8, 8)), "dense = 'RGB': is no map of numbers; store mode F, I or I;16, or an array"),
    ],
)
def test_unusable_values_are_refused_in_one_line(raw: Any, text: str) -> None:
    with pytest.raises(InputError) as caught:
        dense().preprocess(raw)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("nowhere.npy", "no such file"),
        ("nowhere.png", "no such file"),
        ("pickled.npy", "cannot be read as .npy: "),
        ("empty.npy", "cannot be read as .npy: "),
        ("text.png", "cannot be read as an image: "),
    ],
)
def test_text_that_is_no_map_is_refused(
    text: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("pickled.npy", np.array([{}]), allow_pickle=True)
    Path("empty.npy").touch()
    Path("text.png").write_text("no image")
    with pytest.raises(InputError) as caught:
        dense().parse(text)
    assert str(caught.value).startswith(f"dense = {text!r}: {remedy}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ([], "dense = None: the column is empty; check data.columns"),
        ([None], "dense = None: the column is empty"),
        ([MAP, WITH_NAN], "dense = 'a map': must be finite"),
        ([MAP, MAP[:, :7]], "dense.size = '7x8 and 8x8': images of several sizes; set size, and resize: true"),
        (["depth.png"], "dense = 'str': is no map of numbers"),
        ([[[1.0, 2.0], [3.0]]], "dense = 'list': is no map of numbers"),
    ],
)
def test_unusable_columns_are_refused(column: list[Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        Dense.settings_from_data(None, column)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"channels": 0}, "channels = 0: needs at least one"),
        ({"std": 0.0}, "std = 0.0: must be positive; the column may be constant"),
        ({"std": math.nan}, "std = nan: must be positive"),
        ({"size": 12}, "size = (12, 12): must be a whole multiple or a divisor of the grid (8, 8)"),
        ({"size": [8, 16]}, "size = (8, 16): must be"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        dense(**settings)
    assert str(caught.value).startswith(text)


# ------------------------------------------------------------------------------------------------------------- resizing


def test_a_map_of_another_size_is_cut_and_resized() -> None:
    rows = np.linspace(1.0, 9.0, 16, dtype=np.float32)[:, None].repeat(20, axis=1)  # (16, 20): every row one number
    rows[:, :2] = rows[:, -2:] = 1e6  # outside the centre crop
    value = dense(resize=True).preprocess(rows)
    assert value.shape == (1, 8, 8)
    inner = value[0, :, 1:-1]
    pairs = torch.from_numpy(rows[:, 10].reshape(8, 2).mean(axis=1))
    torch.testing.assert_close(inner, pairs[:, None].expand_as(inner), rtol=0, atol=0.3)
    edge = dense(resize=True).preprocess(np.kron(np.eye(8), np.ones((2, 2))) * 80)
    assert edge.min() >= 0 and edge.max() <= 80  # nothing overshoots


@pytest.mark.parametrize("ending", ["npy", "tiff"])
def test_a_file_of_another_size_is_resized_whatever_is_set(ending: str, tmp_path: Path) -> None:
    path, big = tmp_path / f"depth.{ending}", np.kron(MAP, np.ones((2, 2))).astype(np.float32)
    np.save(path, big) if ending == "npy" else PILImage.fromarray(big).save(path)
    read = dense().preprocess(dense().parse(str(path)))
    assert torch.equal(read, dense(resize=True).preprocess(big))


def test_a_subclass_sees_the_logarithm_of_resized_metres(tmp_path: Path) -> None:
    class Log(Dense):
        @staticmethod
        def transform(array: np.ndarray) -> np.ndarray:
            return np.log(array)

    metres = np.full((16, 16), 5.0, np.float32)
    np.save(tmp_path / "m.npy", metres)
    own = Log(SHAPE, channels=1, size=8, resize=True)
    for raw in (metres, own.parse(str(tmp_path / "m.npy"))):
        torch.testing.assert_close(own.preprocess(raw), torch.full((1, 8, 8), math.log(5.0)))


def test_a_size_that_is_set_stays() -> None:
    found = Dense.settings_from_data(None, [MAP, MAP[:, :7]], size=8)
    assert "size" not in found and found["channels"] == 1


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_sixteen_bits_of_either_byte_order(mode: str) -> None:
    numbers = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    order = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I;16N": "=u2"}[mode]
    raw = PILImage.frombytes(mode, (8, 8), numbers.astype(order).tobytes())
    assert torch.equal(dense().preprocess(raw)[0], torch.from_numpy(numbers.astype(np.float32)))


def test_an_array_file_is_a_map(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", MAP)
    raw = {"bytes": None, "path": str(tmp_path / "d.npy")}
    assert torch.equal(dense().preprocess(raw), dense().preprocess(MAP))
