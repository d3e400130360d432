"""Embeddings: direction and norm apart, the likelihood against SciPy, and what is refused in which words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import lognorm, vonmises_fisher
from torch import Generator, Tensor
from torch.nn.functional import cosine_similarity, normalize

from mmdiff.errors import InputError
from mmdiff.modalities import Embedding, Shape

SHAPE = Shape((2, 4, 4), 4, 6)
MEAN, STD = 1.5, 0.25  # of log ‖x‖


def embedding(dim: int = 5, shape: Shape = SHAPE, **settings: Any) -> Embedding:
    torch.manual_seed(0)
    return Embedding(shape, dim, **{"log_norm_mean": MEAN, "log_norm_std": STD, **settings})


def vectors(count: int, dim: int = 5, seed: int = 0) -> Tensor:
    generator = Generator().manual_seed(seed)
    directions = normalize(torch.randn(count, dim, generator=generator), dim=1)
    return directions * (MEAN + STD * torch.randn(count, 1, generator=generator)).exp()


def params_of(direction: Tensor, concentration: float, mean: float = 0.0, log_std: float = 0.0) -> Tensor:
    """Params of a law by its numbers, κ through the inverse of softplus: (B, D + 3)."""
    raw = math.log(math.expm1(concentration / direction.shape[1]))
    return torch.cat([direction, torch.tensor([raw, mean, log_std]).to(direction).expand(len(direction), 3)], dim=1)


# ------------------------------------------------------------------------------------------------- norm and direction


def test_the_encoding_knows_the_direction_and_the_context_the_norm_too() -> None:
    modality, value = embedding(), vectors(4)
    torch.testing.assert_close(modality.encode(3 * value), modality.encode(value))
    assert not torch.allclose(modality.context(3 * value), modality.context(value), atol=1e-3)
    assert not torch.allclose(modality.encode(-value), modality.encode(value), atol=0.1)


def test_a_constant_norm_is_not_learned_and_not_shown() -> None:
    modality = embedding(log_norm_std=1e-7)
    value = normalize(vectors(4), dim=1) * math.exp(MEAN)
    torch.testing.assert_close(modality.context(value * (1 + 1e-6)), modality.context(value))
    params = modality.decode(torch.zeros(4, 4, 4, 4), torch.randn(4, 6))
    other = params.clone()
    other[:, -2:] += 1.0
    assert torch.equal(modality.nll(other, value), modality.nll(params, value))
    for found in (modality.mode(other), modality.sample(other, torch.randn(4, 7))):
        torch.testing.assert_close(found.norm(dim=1), torch.full((4,), math.exp(MEAN)))


@pytest.mark.parametrize(("shape", "isometric"), [(Shape((2, 4, 4), 4, 6), True), (Shape((1, 2, 2), 4, 6), False)])
def test_encodings_keep_the_angles_where_the_space_is_large_enough(shape: Shape, isometric: bool) -> None:
    modality, value = embedding(12, shape), vectors(30, 12)
    flat = modality.encode(value).flatten(1)
    torch.testing.assert_close(flat.square().mean(dim=1), torch.ones(30))
    cosines = flat @ flat.T / flat.shape[1]
    unit = normalize(value, dim=1)
    assert torch.allclose(cosines, unit @ unit.T, atol=1e-5) is isometric


def test_a_coarse_map_is_a_pattern_of_blocks() -> None:
    encoding = embedding(map_size=2).encode(vectors(3))
    assert torch.equal(encoding, encoding[..., ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert len(encoding[0, 0].unique()) == 4


# ---------------------------------------------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("dim", [2, 3, 16, 64])
@pytest.mark.parametrize("concentration", [0.5, 20.0, 300.0])
def test_nll_is_scipys_of_direction_and_norm_together(dim: int, concentration: float) -> None:
    value = vectors(5, dim).double()
    means = normalize(torch.randn(5, dim, generator=Generator().manual_seed(1)).double(), dim=1)
    params = params_of(2.5 * means, concentration, mean=0.7, log_std=-0.4)  # its length does not count
    norm = value.norm(dim=1)
    expected = [
        vonmises_fisher(mean.numpy(), concentration).logpdf((x / r).numpy())
        # lognorm is the density of ‖x‖; that of log ‖x‖ is ‖x‖ times as large
        + lognorm(STD * math.exp(-0.4), scale=math.exp(MEAN + STD * 0.7)).logpdf(float(r)) + math.log(float(r))
        for mean, x, r in zip(means, value, norm, strict=True)
    ]  # fmt: skip
    found = -embedding(dim).double().nll(params, value) * dim
    torch.testing.assert_close(found, torch.tensor(np.array(expected).ravel()), rtol=1e-6, atol=1e-8)


def test_the_density_integrates_to_one() -> None:
    """In two dimensions, over the angle and log ‖x‖."""
    angles = torch.arange(400, dtype=torch.float64) / 400 * 2 * math.pi
    logs = MEAN + torch.linspace(-12, 12, 2001, dtype=torch.float64) * STD
    grid = torch.cartesian_prod(angles, logs)
    value = torch.stack([grid[:, 0].cos(), grid[:, 0].sin()], dim=1) * grid[:, 1:].exp()
    params = params_of(torch.tensor([[0.6, 0.8]], dtype=torch.float64), 9.0, mean=0.5, log_std=0.3)
    density = (-2 * embedding(2).double().nll(params.expand(len(value), -1), value)).exp()
    cell = (angles[1] - angles[0]) * (logs[1] - logs[0])
    assert float(density.sum() * cell) == pytest.approx(1.0, abs=1e-6)


def test_a_fixed_concentration_makes_the_loss_a_scaled_cosine() -> None:
    kappa, dim = 25.0, 5
    modality, value = embedding(concentration=kappa), vectors(6)
    means = normalize(torch.randn(6, dim, generator=Generator().manual_seed(1)), dim=1)
    params = torch.cat([means, torch.randn(6, 1).expand(6, 1), torch.zeros(6, 2)], dim=1)
    other = torch.cat([means.roll(1, 0), torch.randn(6, 1), torch.zeros(6, 2)], dim=1)
    difference = (modality.nll(other, value) - modality.nll(params, value)) * dim
    expected = kappa * (cosine_similarity(means, value) - cosine_similarity(means.roll(1, 0), value))
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-4)


def test_the_mode_points_along_the_mean_with_the_median_norm() -> None:
    modality, means = embedding(), torch.randn(4, 5, generator=Generator().manual_seed(1))
    mode = modality.mode(params_of(means, 30.0, mean=-0.8))
    torch.testing.assert_close(cosine_similarity(mode, means), torch.ones(4))
    torch.testing.assert_close(mode.norm(dim=1), torch.full((4,), math.exp(MEAN - 0.8 * STD)))


def test_draws_have_the_laws_cosine_and_norm() -> None:
    """In three dimensions E[cos] = coth κ − 1/κ."""
    count, kappa = 20_000, 4.0
    params = params_of(torch.tensor([[0.0, 0.6, 0.8]]), kappa, mean=0.5, log_std=-0.7).expand(count, -1)
    drawn = embedding(3).sample(params, torch.randn(count, 5, generator=Generator().manual_seed(0))).double()
    cosines = cosine_similarity(drawn, torch.tensor([[0.0, 0.6, 0.8]], dtype=torch.float64))
    assert float(cosines.mean()) == pytest.approx(1 / math.tanh(kappa) - 1 / kappa, abs=4 * 0.25 / math.sqrt(count))
    logs, spread = drawn.norm(dim=1).log(), STD * math.exp(-0.7)
    assert float(logs.mean()) == pytest.approx(MEAN + 0.5 * STD, abs=4 * spread / math.sqrt(count))
    assert float(logs.std()) == pytest.approx(spread, rel=4 / math.sqrt(2 * count))
    assert abs(float(torch.corrcoef(torch.stack([cosines, logs]))[0, 1])) < 4 / math.sqrt(count)  # independent


# ---------------------------------------------------------------------------------------------------------- raw values


def test_the_placeholder_is_a_vector_of_typical_norm() -> None:
    placeholder = embedding().placeholder()
    embedding().check(placeholder[None])
    assert float(placeholder.norm()) == pytest.approx(math.exp(MEAN), rel=1e-5)


@pytest.mark.parametrize("kind", [list, tuple, np.float32, np.float64])
def test_vectors_are_read_from_lists_and_arrays(kind: Any) -> None:
    numbers = [0.5, -1.0, 2.0, 0.0, 3.25]
    value = embedding().preprocess(kind(numbers))
    assert value.dtype == torch.float32 and value.tolist() == numbers


def test_text_is_a_file_or_numbers(tmp_path: Path) -> None:
    numbers = [0.5, -1.0, 2.0, 0.0, 3.25]
    np.save(tmp_path / "vector.npy", np.array(numbers))
    (tmp_path / "vector.json").write_text(json.dumps(numbers))
    for text in (str(tmp_path / "vector.npy"), str(tmp_path / "vector.json"), "0.5,-1,2,0,3.25"):
        assert embedding().preprocess(embedding().parse(text)).tolist() == numbers


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("nowhere.npy", "no such file"),
        ("nowhere.json", "no such file"),
        ("1,x", "cannot be read as .npy, .json or numbers with commas: "),
        ("", "cannot be read as .npy, .json or numbers with commas: "),
        ("pickled.npy", "cannot be read as .npy: "),
        ("empty.npy", "cannot be read as .npy: "),
        ("broken.json", "cannot be read as .npy, .json or numbers with commas: "),
    ],
)
def test_text_that_is_no_vector_is_refused(
    text: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("pickled.npy", np.array([{}]), allow_pickle=True)
    Path("empty.npy").touch()
    Path("broken.json").write_text("[1,")
    with pytest.raises(InputError) as caught:
        embedding().parse(text)
    assert str(caught.value).startswith(f"embedding = {text!r}: {remedy}")
    assert "\n" not in str(caught.value)


def test_the_data_determine_the_dimension_and_the_law_of_the_norm() -> None:
    value = vectors(500).numpy()
    settings = Embedding.settings_from_data(None, [None, *value.tolist()])
    logs = np.log(np.linalg.norm(value, axis=1))
    assert settings["dim"] == 5
    assert settings["log_norm_mean"] == pytest.approx(logs.mean(), rel=1e-5)
    assert settings["log_norm_std"] == pytest.approx(logs.std(), rel=1e-5)
    assert not Embedding(SHAPE, **settings).constant_norm
    unit = (value / np.linalg.norm(value, axis=1, keepdims=True)).tolist()  # CLIP's, normalised
    assert Embedding(SHAPE, **Embedding.settings_from_data(None, unit)).constant_norm


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ([0.0] * 5, "embedding = 'a vector': must be finite and not zero: it has no direction"),
        ([1.0, math.nan, 0.0, 0.0, 0.0], "embedding = 'a vector': must be finite"),
        ([1.0, math.inf, 0.0, 0.0, 0.0], "embedding = 'a vector': must be finite"),
        ([1.0, 2.0], "embedding = '2 numbers': expected 5"),
        ([[1.0], [1.0, 2.0]], "embedding = 'list': is no vector of numbers"),
        ([[1.0] * 5], "embedding = 'list': is no vector of numbers; check data.columns"),
        (["a"] * 5, "embedding = 'list': is no vector of numbers"),
        ([True] * 5, "embedding = 'list': is no vector of numbers"),
        (3.0, "embedding = 'float': is no vector of numbers"),
        (None, "embedding = 'NoneType': is no vector of numbers"),
    ],
)
def test_unusable_values_are_refused_in_one_line(raw: Any, text: str) -> None:
    with pytest.raises(InputError) as caught:
        embedding().preprocess(raw)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_batches_with_a_vector_without_direction_are_refused(bad: float) -> None:
    value = vectors(3)
    embedding().check(value)
    value[1] = bad
    with pytest.raises(InputError, match="embedding = 'a vector': must be finite and not zero"):
        embedding().check(value)


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ([], "embedding = None: the column is empty"),
        ([None, None], "embedding = None: the column is empty"),
        ([[1.0, 2.0], [1.0]], "embedding = [1, 2]: vectors of one column need one length"),
        ([[0.0, 0.0]], "embedding = 'a vector': must be finite and not zero"),
    ],
)
def test_unusable_columns_are_refused(column: list[Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        Embedding.settings_from_data(None, column)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"dim": 1}, "dim = 1: a direction needs at least two dimensions"),
        ({"map_size": 3}, "map_size = 3: must divide the diffusion space's 4x4"),
        ({"map_size": 0}, "map_size = 0: must divide"),
        ({"map_size": 8}, "map_size = 8: must divide"),
        ({"concentration": 0.0}, "concentration = 0.0: must be positive; leave it out to predict it"),
        ({"concentration": math.nan}, "concentration = nan: must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        embedding(**settings)
    assert str(caught.value).startswith(text)
