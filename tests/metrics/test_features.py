"""Features and their distances against closed forms, torchmetrics, and laws whose distance is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.models import alexnet, squeezenet1_1

from mmdiff.errors import InputError
from mmdiff.metrics.features import (
    SMALLEST,
    Features,
    Inception,
    Pixels,
    Trunk,
    at_least,
    distances,
    extractor,
    frechet_distance,
    split_rows,
)

WEIGHTS = Path(__file__).parents[3] / "shared" / "data" / "weights"


def with_moments(mean: np.ndarray, covariance: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows (n, d) whose sample mean and covariance are exactly these."""
    rows = np.random.default_rng(seed).standard_normal((count, len(mean)))
    rows -= rows.mean(0)
    white = rows @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(rows, rowvar=False)))).T
    return mean + white @ np.linalg.cholesky(covariance).T


def law(dimension: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((dimension, dimension))
    return rng.standard_normal(dimension), factor @ factor.T + 0.1 * np.eye(dimension)


@pytest.mark.parametrize("dimension", [1, 2, 5, 20])
def test_frechet_distance_is_the_closed_form(dimension: int) -> None:
    (m, s), (n, r) = law(dimension, 0), law(dimension, 1)
    root = sqrtm(s)
    expected = ((m - n) ** 2).sum() + np.trace(s + r - 2 * sqrtm(root @ r @ root).real)
    actual = frechet_distance(with_moments(m, s, 500, 2), with_moments(n, r, 300, 3))
    assert actual == pytest.approx(float(expected), rel=1e-8)


def test_frechet_distance_is_a_squared_metric_on_laws() -> None:
    one, other = with_moments(*law(4, 0), 200, 2), with_moments(*law(4, 1), 200, 3)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-6)  # √ of rounding errors of about 1e-14
    assert frechet_distance(one + 3.0, one) == pytest.approx(4 * 3.0**2, rel=1e-6)  # shifted in 4 dimensions
    # twice the rows have covariance 4 S: tr(4 S + S − 2 · 2 S) = tr S is left when the means agree
    spread = frechet_distance(2 * one, one + one.mean(0))
    assert spread == pytest.approx(float(np.trace(np.cov(one, rowvar=False))), rel=1e-6)


def test_frechet_distance_of_a_degenerate_covariance() -> None:
    """Images have constant pixels: |m − m'|² + σ² is left where the other law is a point in one direction."""
    rows = with_moments(np.zeros(2), np.eye(2), 100, 0)
    flat = rows * np.array([1.0, 0.0])
    assert frechet_distance(rows, flat) == pytest.approx(1.0, abs=1e-6)


def pictures(count: int = 12, channels: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    """(n, C, size, size), smooth."""
    coarse = 2 * torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(seed)) - 1
    return nn.functional.interpolate(coarse, (size, size), mode="bilinear")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing is on disk, and every download goes to a port on which nobody listens. The folder of the weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path / "hub" / "checkpoints"


class AsModule(nn.Module):
    """Features as torchmetrics wants them."""

    def __init__(self, features: Features, size: int) -> None:
        super().__init__()
        self.features, self.num_features = features, size

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.features(images))


def test_fid_is_that_of_torchmetrics(backbone: Path) -> None:
    """Fewer rows than features, and more rows than features."""
    real, fake = pictures(seed=0), pictures(seed=1) ** 2
    trunk, pixels = Trunk(backbone), Pixels(pictures(40, seed=2), components=5)
    for features, size in ((trunk, 512), (pixels, 5)):
        metric = FrechetInceptionDistance(AsModule(features, size))
        metric.set_dtype(torch.float64)
        metric.update(real, real=True)
        metric.update(fake, real=False)
        expected = float(metric.compute())
        assert expected > 1e-4
        assert frechet_distance(features(fake), features(real)) == pytest.approx(expected, rel=1e-4)


def test_kid_is_that_of_torchmetrics_on_the_same_rows() -> None:
    features = Pixels(pictures(40, seed=2), components=5)
    samples, real = pictures(6, seed=1) ** 2, pictures(12)
    drawn, reference, _ = next(split_rows(samples.numpy(), real.numpy(), 1, seed=3))
    metric = KernelInceptionDistance(AsModule(features, 5), subsets=1, subset_size=6)  # a subset of all rows
    metric.update(torch.from_numpy(reference), real=True)
    metric.update(torch.from_numpy(drawn), real=False)
    found = distances(features(samples), features(real), splits=1, seed=3)
    assert found["KID"] == pytest.approx(float(metric.compute()[0]), rel=1e-5)
    assert found["KID spread"] == 0.0


def rows(count: int, seed: int, mean: float = 0.0) -> np.ndarray:
    """(n, 1), of N(mean, 1)."""
    return mean + np.random.default_rng(seed).standard_normal((count, 1))


@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_kid_has_no_bias(mean: float) -> None:
    """(x y + 1)³ compares the moments: 3 Δm₁² + 3 Δm₂² + Δm₃², for N(μ, 1) against N(0, 1)."""
    expected = 3 * mean**2 + 3 * mean**4 + (mean**3 + 3 * mean) ** 2
    found = [distances(rows(50, k, mean), rows(100, 1000 + k), splits=1) for k in range(400)]
    for name, value in (("KID", expected), ("KID, real against real", 0.0)):
        values = np.array([one[name] for one in found])
        assert abs(values.mean() - value) < 4 * values.std() / math.sqrt(len(values))
        assert value > 0 or (values < 0).any()  # an unbiased estimate of 0 is negative now and then


def test_samples_of_the_real_law_are_at_the_apart() -> None:
    real = np.random.default_rng(0).standard_normal((800, 4))
    same, far = (scale * np.random.default_rng(1).standard_normal((400, 4)) for scale in (1, 2))
    at_best, found = distances(same, real), distances(far, real)
    assert 0.5 < at_best["FID"] / at_best["FID, real against real"] < 2.0
    assert abs(at_best["KID"]) < 5 * at_best["KID spread"]
    # N(0, 4 I) against N(0, I): tr(4 + 1 − 2 · 2) = 4
    assert found["FID"] == pytest.approx(4.0, rel=0.2)
    assert found["KID"] > 10 * found["KID spread"] > 0
    for name in ("FID, real against real", "KID, real against real", "FID rows"):
        assert found[name] == at_best[name]
    assert found["FID rows"] == 400


def test_the_floor_falls_with_the_number_of_rows() -> None:
    """A squared distance of two empirical laws falls like 1/n: a quarter at four times the rows."""
    real, samples = np.random.default_rng(0).standard_normal((2, 1600, 8))
    apart = [distances(samples[:n], real[: 2 * n])["FID, real against real"] for n in (200, 800)]
    assert 0.15 < apart[1] / apart[0] < 0.4


def test_distances_depend_on_the_seed_only() -> None:
    real, samples = rows(60, 0), rows(40, 1)
    assert distances(samples, real, seed=1) == distances(samples, real, seed=1)
    assert distances(samples, real, seed=1) != distances(samples, real, seed=2)


@pytest.mark.parametrize(("samples", "real", "size"), [(50, 20, 10), (7, 100, 7), (10, 21, 10)])
def test_splits_are_disjoint_and_of_one_size(samples: int, real: int, size: int) -> None:
    for drawn, reference, rest in split_rows(np.arange(samples), -1 - np.arange(real), 3, seed=0):
        assert [len(set(part)) for part in (drawn, reference, rest)] == [size] * 3
        assert not set(reference) & set(rest)
        assert (drawn >= 0).all() and (reference < 0).all() and (rest < 0).all()


@pytest.mark.parametrize(("samples", "real"), [(1, 100), (100, 3)])
def test_too_few_rows_are_refused(samples: int, real: int) -> None:
    with pytest.raises(InputError, match="evaluate.num_samples"):
        distances(rows(samples, 0), rows(real, 1))
    assert all(map(math.isfinite, distances(rows(2, 0), rows(4, 1)).values()))


def test_pixels_are_principal_components_of_the_training_rows() -> None:
    train, images = pictures(40, seed=0), pictures(6, seed=1)
    pixels = Pixels(train, components=5)
    assert pixels.name == "pixels, PCA 5"
    flat = PCA(5, svd_solver="full").fit(train.flatten(1).double().numpy())
    assert np.allclose(pixels(images), flat.transform(images.flatten(1).double().numpy()))
    assert pixels(images).dtype == np.float64
    few = Pixels(pictures(3))
    assert (few.name, few(images).shape) == ("pixels, PCA 3", (6, 3))


def test_trunk_features_are_means_over_the_last_fire_module(backbone: Path) -> None:
    trunk, images = Trunk(backbone), pictures(70)  # more than one batch
    found = trunk(images)
    assert (trunk.name, found.shape, found.dtype) == ("squeezenet1_1 mine", (70, 512), np.float64)
    network = squeezenet1_1(weights=None).eval()
    network.load_state_dict(torch.load(backbone, weights_only=True))
    mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    large = nn.functional.interpolate(images[65:], (SMALLEST, SMALLEST), mode="bilinear")
    with torch.no_grad():
        expected = network.features(((large + 1) / 2 - mean) / std).mean((2, 3))
    assert np.allclose(found[65:], expected.numpy(), atol=1e-6)


def test_grey_images_are_grey_rgb_images(backbone: Path) -> None:
    trunk, images = Trunk(backbone), pictures(channels=1)
    assert np.array_equal(trunk(images), trunk(images.repeat(1, 3, 1, 1)))


def test_small_images_are_enlarged_in_proportion() -> None:
    assert at_least(pictures(size=16)[:, :, :8], 64).shape == (12, 3, 64, 128)
    large = pictures(size=64)
    assert at_least(large, 64) is large


def test_a_file_may_lack_the_classifier_but_nothing_else(backbone: Path, tmp_path: Path) -> None:
    state = torch.load(backbone, weights_only=True)
    features = {name: value for name, value in state.items() if name.startswith("features.")}

    def saved(content: object) -> Path:
        torch.save(content, tmp_path / "other.pth")
        return tmp_path / "other.pth"

    images = pictures(2)
    assert np.array_equal(Trunk(saved(features))(images), Trunk(backbone)(images))
    features.pop("features.12.squeeze.bias")
    for strange in (features, alexnet(weights=None).state_dict(), {"conv1.weight": torch.zeros(1)}, [1, 2], {"a": 1}):
        with pytest.raises(InputError, match="evaluate.features = .*other.pth"):
            Trunk(saved(strange))
    (tmp_path / "text.pth").write_text("no weights")
    for file in (tmp_path / "text.pth", tmp_path / "absent.pth", tmp_path):
        with pytest.raises(InputError, match="no such state dict can be read"):
            Trunk(file)


def test_features_by_name(backbone: Path, offline: Path) -> None:
    train = pictures(20)
    assert extractor("pixels", train).name == "pixels, PCA 20"
    assert extractor("auto", train).name == "pixels, PCA 20"  # no inception on disk
    assert extractor(str(backbone), train).name == "squeezenet1_1 mine"
    with pytest.raises(InputError, match="evaluate.features = 'inceptoin'"):
        extractor("inceptoin", train)
    with pytest.raises(InputError, match=r"evaluate.features = 'inception': its weights cannot be had.*6726825d.pth"):
        extractor("inception", train)


def test_inception_reads_the_file_on_disk(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights stand where the download would be."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    offline.mkdir(parents=True)
    file = offline / Path(URL_INCEPTION_V3).name
    torch.save({}, file)
    with monkeypatch.context() as unloaded:
        unloaded.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))
    for value in network.state_dict().values():
        if value.ndim == 4:  # torch's own initial weights let the images fade away on the way
            nn.init.kaiming_normal_(value, generator=torch.Generator().manual_seed(0))
    torch.save(network.state_dict(), file)
    images = pictures(2, channels=1)
    inception = extractor("auto", images)
    assert isinstance(inception, Inception)
    found = inception(images)
    assert (found.shape, found.dtype) == ((2, 2048), np.float64)
    bytes_ = (255 * (images.repeat(1, 3, 1, 1) + 1) / 2).round().to(torch.uint8)
    differences = np.abs(found - network(bytes_)[0].numpy())
    assert differences.max() < 1e-4 * np.abs(found[0] - found[1]).max()


@pytest.mark.data
def test_real_weights_tell_noise_from_pictures() -> None:
    trunk = Trunk(WEIGHTS / "squeezenet1_1_caffe_imagenetnorm.pth")
    real, same = trunk(pictures(100, seed=0)), trunk(pictures(50, seed=1))
    noise = trunk((pictures(50, seed=1) + 0.3 * torch.randn(50, 3, 16, 16)).clamp(-1, 1))
    near, far = distances(same, real), distances(noise, real)
    assert far["FID"] > 2 * near["FID"]
    assert far["KID"] > near["KID"] + 5 * near["KID spread"]
