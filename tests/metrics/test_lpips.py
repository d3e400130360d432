"""LPIPS against the lpips package called directly, and laws of a perceptual distance."""

from __future__ import annotations

import hashlib
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.models import alexnet, squeezenet1_1, vgg16
from torchvision.transforms.functional import gaussian_blur

from mmdiff.errors import InputError
from mmdiff.metrics.lpips import Perceptual

WEIGHTS = Path(__file__).parents[3] / "shared" / "data" / "weights"
CAFFE, HEADS = WEIGHTS / "squeezenet1_1_caffe_imagenetnorm.pth", WEIGHTS / "lpips_v0.1_squeeze_lin.pth"


@pytest.fixture(scope="module")
def random(backbone: Path) -> Perceptual:
    return Perceptual("squeeze", backbone=backbone)


@pytest.fixture(scope="module", params=["random", pytest.param("caffe", marks=pytest.mark.data)])
def perceptual(request: pytest.FixtureRequest, backbone: Path) -> Perceptual:
    """With random and with real weights."""
    return Perceptual("squeeze", backbone=backbone if request.param == "random" else CAFFE)


def direct(file: Path, spatial: bool = False) -> lpips.LPIPS:
    """The lpips package with a trunk put in slice by slice."""
    network = lpips.LPIPS(net="squeeze", pnet_rand=True, spatial=spatial, verbose=False)
    trunk = squeezenet1_1(weights=None)
    trunk.load_state_dict(torch.load(file, weights_only=True))
    ends = [0, 2, 5, 8, 10, 11, 12, 13]
    for k in range(7):
        setattr(network.net, f"slice{k + 1}", trunk.features[ends[k] : ends[k + 1]])
    return network.eval()


def photographs(size: int = 64) -> Tensor:
    """(4, 3, size, size) in [−1, 1]: pieces of the two photographs that ship inside scikit-learn."""
    pieces = [image[y : y + size, 100 : 100 + size] for image in load_sample_images().images for y in (60, 160)]
    return torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2).float() / 127.5 - 1


def noisy(images: Tensor, scale: float) -> Tensor:
    return (images + scale * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)


def everywhere(images: Tensor) -> Tensor:
    return torch.ones(len(images), 1, *images.shape[2:])


def test_whole_is_lpips_called_directly(random: Perceptual, backbone: Path) -> None:
    truth = photographs()
    with torch.no_grad():
        expected = direct(backbone)(noisy(truth, 0.3), truth).flatten()
    assert (expected > 0).all()
    assert torch.allclose(random.whole(noisy(truth, 0.3), truth), expected, rtol=1e-5)


def test_a_hole_over_everything_is_the_mean_of_the_spatial_map(random: Perceptual, backbone: Path) -> None:
    truth = photographs()
    with torch.no_grad():
        maps = direct(backbone, spatial=True)(noisy(truth, 0.3), truth)
    assert maps.shape == (4, 1, 64, 64)
    found = random.hole(noisy(truth, 0.3), truth, everywhere(truth))
    assert torch.allclose(found, maps.mean(dim=(1, 2, 3)), rtol=1e-5)
    left = everywhere(truth)
    left[..., 20:] = 0
    found = random.hole(noisy(truth, 0.3), truth, left.bool())
    assert torch.allclose(found, maps[..., :20].mean(dim=(1, 2, 3)), rtol=1e-5)
    # hole and whole may alternate
    assert torch.equal(random.whole(truth, noisy(truth, 0.3)), random.whole(truth, noisy(truth, 0.3)))


def test_equal_images_have_no_distance(perceptual: Perceptual) -> None:
    truth = photographs()
    assert perceptual.whole(truth, truth).tolist() == [0.0] * 4
    assert perceptual.hole(truth, truth, everywhere(truth)).tolist() == [0.0] * 4


def test_the_distance_is_symmetric_and_grows_with_noise(perceptual: Perceptual) -> None:
    truth = photographs()
    values = torch.stack([perceptual.whole(noisy(truth, scale), truth) for scale in (0.02, 0.05, 0.1, 0.2, 0.4)])
    assert (values[0] > 0).all()
    assert (values.diff(dim=0) > 0).all()
    assert torch.allclose(perceptual.whole(truth, noisy(truth, 0.2)), values[3], rtol=1e-4)


def test_far_from_the_change_the_map_is_zero(random: Perceptual) -> None:
    """The last layer sees 207 pixels (one convolution, three poolings and eight fire modules, at strides up to 16)."""
    truth = photographs(256)[:1]
    changed = truth.clone()
    changed[..., :8, :8] = 1.0
    corners = {corner: torch.zeros(1, 1, 256, 256) for corner in ("near", "far")}
    corners["near"][..., :16, :16], corners["far"][..., -80:, -80:] = 1, 1
    assert random.hole(changed, truth, corners["near"]) > 0
    assert random.hole(changed, truth, corners["far"]) == 0


@pytest.mark.parametrize(("height", "width"), [(16, 16), (28, 28), (32, 48)])
def test_small_images_are_enlarged_with_their_masks(random: Perceptual, height: int, width: int) -> None:
    truth = photographs()[..., :height, :width]
    size = (64, 64 * width // height)
    images, large = (
        noisy(truth, 0.3),
        [nn.functional.interpolate(x, size, mode="bilinear") for x in (noisy(truth, 0.3), truth)],
    )
    assert torch.equal(random.whole(images, truth), random.whole(*large))
    left = everywhere(truth)
    left[..., width // 2 :] = 0
    large_left = torch.zeros(4, 1, *size)
    large_left[..., : size[1] // 2] = 1
    assert torch.allclose(random.hole(images, truth, left), random.hole(*large, large_left), rtol=1e-5)


def test_grey_images_are_grey_rgb_images(random: Perceptual) -> None:
    grey = photographs()[:, :1]
    coloured = grey.repeat(1, 3, 1, 1)
    assert torch.equal(
        random.whole(noisy(grey, 0.1), grey), random.whole(noisy(grey, 0.1).repeat(1, 3, 1, 1), coloured)
    )


def test_more_images_than_a_batch(random: Perceptual) -> None:
    truth = photographs(64).repeat(17, 1, 1, 1)[:66, :, :16, :16]
    images = noisy(truth, 0.2)
    found = random.whole(images, truth)
    assert found.shape == (66,)
    assert torch.allclose(found[64:], random.whole(images[64:], truth[64:]), rtol=1e-4)
    where = everywhere(truth)
    assert torch.allclose(
        random.hole(images, truth, where)[64:], random.hole(images[64:], truth[64:], where[64:]), rtol=1e-4
    )


def test_an_image_without_a_hole_is_refused(random: Perceptual) -> None:
    truth = photographs()
    with pytest.raises(InputError, match="leave it out"):
        random.hole(truth, truth, everywhere(truth) * torch.tensor([1, 0, 1, 1]).reshape(4, 1, 1, 1))


@pytest.mark.parametrize(("net", "build"), [("alex", alexnet), ("vgg", vgg16)])
def test_the_other_trunks_load_too(net: str, build: type, tmp_path: Path) -> None:
    """Only the trunk: its classifier is most of the file."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = build(weights=None).features.state_dict()
    torch.save({f"features.{name}": 0.02 * torch.randn(x.shape) for name, x in shapes.items()}, tmp_path / "trunk.pth")
    score = Perceptual(net, backbone=tmp_path / "trunk.pth")
    assert score.name == f"LPIPS-{net} (backbone trunk)"
    truth = photographs()[:1]
    assert score.whole(noisy(truth, 0.3), truth) > score.whole(noisy(truth, 0.05), truth) > 0


def test_names_and_facts_tell_the_weights(random: Perceptual, backbone: Path) -> None:
    assert random.name == "LPIPS-squeeze (backbone mine)"
    sha = hashlib.sha256(backbone.read_bytes()).hexdigest()[:12]
    assert random.facts() == {
        "LPIPS": "LPIPS-squeeze (backbone mine)",
        "LPIPS net": "squeeze",
        "LPIPS version": "0.1",
        "LPIPS backbone": f"mine.pth (sha256 {sha})",
        "LPIPS heads": "official",
        "LPIPS sizes": "smaller images enlarged to 64 px (bilinear)",
        "LPIPS range": "[-1, 1]",
    }


def test_files_that_do_not_fit_are_refused(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="evaluate.lpips.backbone = .*another network"):
        Perceptual("alex", backbone=backbone)
    with pytest.raises(InputError, match="evaluate.lpips.heads = .*another network"):
        Perceptual("squeeze", backbone=backbone, heads=Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth")
    for file in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(InputError, match="evaluate.lpips.backbone = .*no such state dict"):
            Perceptual("squeeze", backbone=file)


def test_official_weights_that_cannot_be_had_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is on disk, and the download goes to a port on which nobody listens."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="evaluate.lpips.net = 'squeeze': .*evaluate.lpips.backbone=PATH"):
        Perceptual("squeeze")


def test_official_weights_on_disk_are_torchvisions(
    monkeypatch: pytest.MonkeyPatch, backbone: Path, tmp_path: Path
) -> None:
    """A file where torchvision looks (random here; only downloads are checked against the hash in the name)."""
    from torchvision.models import SqueezeNet1_1_Weights

    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / Path(SqueezeNet1_1_Weights.DEFAULT.url).name).symlink_to(backbone)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    official, truth = Perceptual("squeeze"), photographs()
    assert (official.name, official.facts()["LPIPS backbone"]) == ("LPIPS-squeeze v0.1", "torchvision")
    expected = Perceptual("squeeze", backbone=backbone).whole(noisy(truth, 0.1), truth)
    assert torch.equal(official.whole(noisy(truth, 0.1), truth), expected)


@pytest.mark.data
def test_the_heads_in_the_package_are_those_of_the_file() -> None:
    with_file, without = Perceptual("squeeze", backbone=CAFFE, heads=HEADS), Perceptual("squeeze", backbone=CAFFE)
    assert without.name == "LPIPS-squeeze-caffe"
    assert with_file.facts()["LPIPS heads"].startswith("lpips_v0.1_squeeze_lin.pth (sha256 ")
    packaged = torch.load(
        Path(lpips.__file__).parent / "weights" / "v0.1" / "squeeze.pth", weights_only=True, map_location="cpu"
    )
    file = torch.load(HEADS, weights_only=True, map_location="cpu")
    assert packaged.keys() == file.keys()
    assert all(torch.equal(packaged[name], file[name]) for name in file)
    truth = photographs()
    assert torch.equal(with_file.whole(noisy(truth, 0.1), truth), without.whole(noisy(truth, 0.1), truth))


def test_heads_of_a_file_count(backbone: Path, random: Perceptual, tmp_path: Path) -> None:
    """The score is linear in the heads."""
    heads = torch.load(
        Path(lpips.__file__).parent / "weights" / "v0.1" / "squeeze.pth", weights_only=True, map_location="cpu"
    )
    torch.save({name: 2 * value for name, value in heads.items()}, tmp_path / "twice.pth")
    twice, truth = Perceptual("squeeze", backbone=backbone, heads=tmp_path / "twice.pth"), photographs()
    assert torch.allclose(twice.whole(noisy(truth, 0.1), truth), 2 * random.whole(noisy(truth, 0.1), truth), rtol=1e-5)


@pytest.mark.data
def test_distortions_are_ordered_as_people_order_them() -> None:
    """A brighter picture is nearer than a blurred one; their squared errors are in the other order."""
    score, truth = Perceptual("squeeze", backbone=CAFFE), photographs(128)
    brighter, blurred = (truth + 0.2).clamp(-1, 1), gaussian_blur(truth, 13, 3.0)
    assert ((brighter - truth) ** 2).mean() > ((blurred - truth) ** 2).mean()
    ordered = [brighter, noisy(truth, 0.05), blurred, truth.roll(1, dims=0)]  # the last are other pictures
    found = [float(score.whole(images, truth).mean()) for images in ordered]
    assert all(2 * low < high for low, high in zip(found, found[1:]))
