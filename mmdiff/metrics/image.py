"""Distances between images, pixel by pixel: PSNR and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdiff.errors import InputError

PSNR_OF_EQUAL = 100.0  # dB, instead of infinity: a mean over images stays finite

_BATCH = 64


def psnr(images: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of images (n, C, H, W) in [−1, 1] -> (n,) in dB, at most `PSNR_OF_EQUAL`.

    Args:
        mask: (n, 1, H, W), 1 = pixels that count; default all.

    Raises:
        InputError: in some image no pixel counts.
    """
    error = _mean_over((images.double() - truth.double()) ** 2, mask)
    return (10 * torch.log10(2.0**2 / error)).clamp(max=PSNR_OF_EQUAL)


def ssim(images: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Structural similarity of images (n, C, H, W) in [−1, 1] -> (n,); the map's mean over the pixels that count.

    The index is that of intensities in [0, 1]. Its Gaussian window has 11 pixels (σ = 1.5); for images of fewer pixels
    it is the largest odd window that fits, with σ in proportion. Computed in float32: nearly flat images to about 2e-4.

    Args:
        mask: (n, 1, H, W), 1 = pixels that count; default all.

    Raises:
        InputError: images of fewer than 3 pixels, or an image in which no pixel counts.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    radius = min(5, (min(images.shape[2:]) - 1) // 2)
    if radius < 1:
        raise InputError("evaluate.ssim", tuple(images.shape[2:]), "SSIM needs images of 3 pixels at least")
    maps = []
    for one, other in zip(images.split(_BATCH), truth.split(_BATCH), strict=True):
        _, full = structural_similarity_index_measure(
            (one.float() + 1) / 2,
            (other.float() + 1) / 2,
            sigma=1.5 * radius / 5,  # from which torchmetrics takes a window of 2 · radius + 1
            data_range=1.0,
            reduction="none",
            return_full_image=True,
        )
        maps.append(full)
    return _mean_over(torch.cat(maps), mask)


def spread(images: Tensor) -> float:
    """Diversity of images (n, C, H, W): their standard deviation over the n samples, mean over pixels and channels."""
    return float(images.std(dim=0).mean())


def _mean_over(values: Tensor, mask: Tensor | None) -> Tensor:
    """(n, C, H, W) -> (n,): means over channels and the pixels that count (n, 1, H, W)."""
    if mask is None:
        return values.mean(dim=(1, 2, 3))
    pixels = mask.to(values)
    counted = pixels.sum(dim=(1, 2, 3))
    if not counted.all():
        raise InputError("mask", 0, "an image without pixels that count has no score; leave it out")
    return (values.mean(dim=1, keepdim=True) * pixels).sum(dim=(1, 2, 3)) / counted
