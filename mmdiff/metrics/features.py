"""Features of images, and the distances of two sets of them: Fréchet (FID) and kernel (KID)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from mmdiff.errors import InputError

SMALLEST = 64  # pixels; the trunks shrink an image 16 times before their last layer
KID_ROWS = 1000  # of a subset, as in the paper of KID (Bińkowski et al., 2018)
_BATCH = 64


class Features(Protocol):
    """Maps images (n, C, H, W) in [−1, 1] to float64 features (n, d); ``name`` is for manifests."""

    name: str

    def __call__(self, images: Tensor) -> np.ndarray: ...


class Pixels:
    """Principal components of the pixels, fitted on training rows.

    Args:
        train: (n, …) training images, on the CPU.
        components: how many; fewer where the rows or the pixels are fewer.
    """

    def __init__(self, train: Tensor | np.ndarray, components: int = 32) -> None:
        rows = flat(train)
        solver = "full" if rows.shape[1] <= 1024 else "randomized"  # exact costs minutes for thousands of pixels
        self._pca = PCA(n_components=min(components, *rows.shape), svd_solver=solver, random_state=0).fit(rows)
        self.name = f"pixels, PCA {self._pca.n_components_}"

    def __call__(self, images: Tensor | np.ndarray) -> np.ndarray:
        """(n, …) -> (n, d)."""
        return self._pca.transform(flat(images))


class Trunk:
    """SqueezeNet 1.1 from a local file: means over the pixels of its last fire module, 512 features.

    Images are repeated to 3 channels, enlarged to `SMALLEST` pixels and normalised as for ImageNet.

    Args:
        file: a state dict with torchvision's names.

    Raises:
        InputError: the file cannot be read, or is not a SqueezeNet 1.1.
    """

    def __init__(self, file: Path) -> None:
        from torchvision.models import squeezenet1_1

        self._network = squeezenet1_1(weights=None).features.eval()
        load_trunk(self._network, read_trunk(file, "evaluate.features"), file, "evaluate.features")
        self.name = f"squeezenet1_1 {Path(file).stem}"

    def __call__(self, images: Tensor) -> np.ndarray:
        """(n, C, H, W) -> (n, 512)."""
        return _in_batches(self._features, images)

    def _features(self, images: Tensor) -> Tensor:
        from torchvision.transforms.functional import normalize

        unit = (at_least(coloured(images), SMALLEST) + 1) / 2
        maps = self._network.to(images.device)(normalize(unit, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        return maps.mean(dim=(2, 3))  # (b, 512, h, w) -> (b, 512)


class Inception:
    """The network of the published FID (torch-fidelity's port of the 2015 weights): 2048 features.

    Images become 8-bit RGB and are resized to 299 pixels as the original did, without antialiasing.

    Raises:
        InputError: the weights are neither on disk nor to be had.
    """

    name = "inception-v3-compat 2048"

    def __init__(self) -> None:
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            self._network = NoTrainInceptionV3("inception-v3-compat", ["2048"], antialias=False)
        except (OSError, RuntimeError) as error:
            remedy = f"its weights cannot be had ({error}); put {_inception_file()} there, or take a trunk of your own"
            raise InputError("evaluate.features", "inception", remedy) from error

    def __call__(self, images: Tensor) -> np.ndarray:
        """(n, C, H, W) -> (n, 2048)."""
        return _in_batches(self._features, images)

    def _features(self, images: Tensor) -> Tensor:
        bytes_ = ((coloured(images) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return self._network.to(images.device)(bytes_)


def extractor(name: str, train: Tensor) -> Features:
    """Features by name.

    Args:
        name: ``"pixels"``, ``"inception"``, ``"auto"`` (inception where its weights are on disk, otherwise pixels), or
            the path of a SqueezeNet 1.1 state dict.
        train: (n, C, H, W) training images, for the pixels' principal components.

    Raises:
        InputError: no such name or file, or no such weights.
    """
    if name == "auto":
        name = "inception" if _inception_file().is_file() else "pixels"
    if name == "pixels":
        return Pixels(train)
    return Inception() if name == "inception" else Trunk(Path(name))


def distances(samples: np.ndarray, real: np.ndarray, splits: int = 5, seed: int = 0) -> dict[str, float]:
    """Fréchet and kernel distance of features (n, d) and (m, d), and the same of real against other real rows.

    Both are means over `split_rows`; the Fréchet distance grows as the rows ("FID rows") fall and is to be compared
    with that of real against real only. The kernel distance (unbiased MMD² of the kernel (x·y/d + 1)³, on at most
    `KID_ROWS` rows) is 0 on average for equal distributions; "KID spread" is its standard deviation over the splits.

    Raises:
        InputError: fewer than 2 samples or 4 real rows.
    """
    from torchmetrics.image.kid import poly_mmd

    if len(samples) < 2 or len(real) < 4:
        raise InputError("evaluate.num_samples", len(samples), "FID and KID need 2 samples and 4 real rows at least")

    def kernel(one: np.ndarray, other: np.ndarray) -> float:
        return float(poly_mmd(torch.from_numpy(one[:KID_ROWS]), torch.from_numpy(other[:KID_ROWS])))

    parts = list(split_rows(samples, real, splits, seed))
    kernels = [kernel(reference, drawn) for drawn, reference, _ in parts]
    return {
        "FID": float(np.mean([frechet_distance(drawn, reference) for drawn, reference, _ in parts])),
        "FID, real against real": float(np.mean([frechet_distance(rest, reference) for _, reference, rest in parts])),
        "FID rows": len(parts[0][0]),
        "KID": float(np.mean(kernels)),
        "KID spread": float(np.std(kernels)),
        "KID, real against real": float(np.mean([kernel(reference, rest) for _, reference, rest in parts])),
    }


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features (n, d): |m − m'|² + tr(S + S' − 2 (S S')^½)."""
    root, other_root = _root(one), _root(other)
    # S = RᵀR, so the eigenvalues of S S' are the squared singular values of R R'ᵀ
    spread = (root**2).sum() + (other_root**2).sum() - 2 * np.linalg.norm(root @ other_root.T, "nuc")
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + spread)


def split_rows(
    samples: np.ndarray, real: np.ndarray, count: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """`count` random triples (samples, real rows, other real rows) of n = min(half of the real rows, samples) each."""
    rng = np.random.default_rng(seed)
    size = min(len(real) // 2, len(samples))
    for _ in range(count):
        order = rng.permutation(len(real))
        reference, rest = real[order[:size]], real[order[size : 2 * size]]
        yield samples[rng.permutation(len(samples))[:size]], reference, rest


def flat(images: Tensor | np.ndarray) -> np.ndarray:
    """(n, …) -> float64 (n, d)."""
    return np.asarray(images, dtype=np.float64).reshape(len(images), -1)


def coloured(images: Tensor) -> Tensor:
    """(n, 1 or 3, H, W) -> (n, 3, H, W)."""
    return images.expand(-1, 3, -1, -1)


def at_least(images: Tensor, side: int, mode: str = "bilinear") -> Tensor:
    """Images (n, C, H, W) whose shorter side is below `side` pixels, enlarged to it in proportion."""
    factor = side / min(images.shape[2:])
    if factor <= 1:
        return images
    size = [round(length * factor) for length in images.shape[2:]]
    return nn.functional.interpolate(images, size, mode=mode)


def read_trunk(file: Path, key: str) -> dict[str, Tensor]:
    """The tensors "features.…" of a torchvision state dict, without that prefix; nothing but tensors is unpickled.

    Raises:
        InputError: naming ``key`` where it cannot be read or holds other networks.
    """
    state = read_state(file, key)
    strange = [name for name in state if not name.startswith(("features.", "classifier."))]
    if strange:
        raise InputError(key, str(file), f"{strange[0]!r} is no name of torchvision's trunk; give features.… only")
    return {name.removeprefix("features."): value for name, value in state.items() if name.startswith("features.")}


def read_state(file: Path, key: str) -> dict[str, Tensor]:
    """A file's state dict, on the CPU; nothing but tensors is unpickled."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is no such thing makes the unpickler say
        remedy = f"no such state dict can be read ({type(error).__name__}); give the path of a file of torch.save"
        raise InputError(key, str(file), remedy) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(key, str(file), "holds no state dict; save network.state_dict() with torch.save")
    return state


def load_trunk(network: nn.Module, state: dict[str, Tensor], file: Path, key: str) -> None:
    """Load strictly; what does not fit is an `InputError`."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(key, str(file), f"the weights are of another network ({str(error)[:200]})") from error


def _root(features: np.ndarray) -> np.ndarray:
    """R (min(n, d), d) with RᵀR = the sample covariance."""
    return np.linalg.qr(features - features.mean(0), mode="r") / np.sqrt(len(features) - 1)


@torch.no_grad()
def _in_batches(network: Callable[[Tensor], Tensor], images: Tensor) -> np.ndarray:
    return torch.cat([network(part).double().cpu() for part in images.float().split(_BATCH)]).numpy()


def _inception_file() -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
