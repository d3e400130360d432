"""Vectors of tables: what is read off the data, ranks and their inverse, and what is refused by row."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm, rankdata

from mmdiff.errors import InputError
from mmdiff.modalities import Dense, Embedding, Shape, Vector

SHAPE = Shape((2, 8, 8), 4, 4)
ROWS = np.random.default_rng(0).lognormal(sigma=2.0, size=(2000, 3)) * [1.0, 1e3, 1e-3]


def fitted(transform: str) -> Vector:
    settings = Vector.settings_from_data(None, [None, *ROWS.tolist()], transform=transform)
    torch.manual_seed(0)
    return Vector(SHAPE, transform=transform, **settings)


def test_mean_and_spread_are_the_datas() -> None:
    value = torch.from_numpy(ROWS).float()
    standardised = fitted("standardise").transform(value)
    torch.testing.assert_close(standardised.mean(0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(standardised.std(0), torch.ones(3), atol=1e-3, rtol=0)


def test_ranks_are_the_normal_quantiles_of_the_ranks() -> None:
    """Against scipy, on data of one mode and three orders of magnitude."""
    value = torch.from_numpy(ROWS).float()
    expected = norm.ppf((rankdata(ROWS, axis=0) - 0.5) / len(ROWS))
    found = fitted("ranks").transform(value).numpy()
    inside = np.abs(expected) < 2
    assert np.abs(found - expected)[inside].max() < 0.05


@pytest.mark.parametrize("transform", ["standardise", "ranks"])
def test_the_inverse_gives_the_data_back(transform: str) -> None:
    modality, value = fitted(transform), torch.from_numpy(ROWS).float()
    inside = modality.transform(value).abs() < 3
    back = modality.inverse(modality.transform(value))
    torch.testing.assert_close(back[inside], value[inside], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("transform", ["standardise", "ranks"])
def test_encodings_of_the_data_have_unit_variance(transform: str) -> None:
    encoded = fitted(transform).encode(torch.from_numpy(ROWS).float())
    assert 0.9 < float(encoded.square().mean()) < 1.1


def test_draws_by_ranks_stay_inside_the_data() -> None:
    modality = fitted("ranks")
    drawn = modality.sample(torch.zeros(500, 6), 5 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0)))
    assert (drawn.numpy() >= ROWS.min(0) - 1e-6).all() and (drawn.numpy() <= ROWS.max(0) * 1.001).all()


@pytest.mark.parametrize(
    "raw", [3, 3.5, np.float32(3.5), [3.5], np.array([3], dtype=np.int64), Decimal("3.5"), [Decimal(3)], 2**24]
)
def test_a_single_number_is_a_vector_of_one(raw: Any) -> None:
    assert Vector.settings_from_data(None, [raw, raw])["dim"] == 1
    assert Vector(SHAPE, dim=1).preprocess(raw).shape == (1,)


def test_a_constant_number_is_no_fault() -> None:
    modality = Vector(SHAPE, **Vector.settings_from_data(None, [[1.0, 2.0], [1.0, 3.0]]))
    assert modality.encode(torch.tensor([[1.0, 2.0]])).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e39, -1e300, 1e19, -2e18])
def test_numbers_that_overflow_are_refused(bad: float) -> None:
    for modality in (Vector(SHAPE, dim=2), Embedding(SHAPE, dim=2)):
        with pytest.raises(InputError, match="finite"):
            modality.preprocess([1.0, bad])
    with pytest.raises(InputError, match="finite"):
        Dense(SHAPE, channels=1, size=8).preprocess(np.full((8, 8), bad).tolist())


@pytest.mark.parametrize("bad", [1e19, -2e18, float("nan")])
def test_observed_tensors_that_overflow_are_refused(bad: float) -> None:
    vectors, maps = torch.tensor([[1.0, bad]]), torch.full((1, 1, 8, 8), bad)
    own = [(Vector(SHAPE, dim=2), vectors), (Embedding(SHAPE, dim=2), vectors)]
    for modality, value in [*own, (Dense(SHAPE, channels=1, size=8), maps)]:
        with pytest.raises(InputError, match="finite"):
            modality.check_observed(value)


def test_a_norm_that_overflows_or_vanishes_is_refused() -> None:
    for bad in ([2e38] * 64, [2e17] * 64, [0.0] * 64, [1e-30] * 64):
        with pytest.raises(InputError, match="^embedding = "):
            Embedding(SHAPE, dim=64).preprocess(bad)


@pytest.mark.parametrize("raw", ["1", [], [[1.0]], [True], None, {"a": 1}, [1.0, "a"], 2**24 + 1, [2.0**40 + 1]])
def test_what_is_no_vector_is_refused(raw: Any) -> None:
    with pytest.raises(InputError, match="^vector = "):
        Vector(SHAPE, dim=1).preprocess(raw)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"dim": 0}, "dim"), ({"dim": 2, "std": [1.0, 0.0]}, "std"), ({"dim": 2, "mean": [1.0]}, "mean"),
        ({"dim": 2, "transform": "log"}, "transform"), ({"dim": 2, "transform": "ranks"}, "quantiles"),
        ({"dim": 2, "map_size": 3}, "map_size"), ({"dim": 1, "mean": [float("nan")]}, "mean"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=f"^{key} = "):
        Vector(SHAPE, **settings)
