"""How values of a kind are compared: one scorer per modality class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mmdiff.metrics.bootstrap import scored
from mmdiff.metrics.classification import classification, retrieval
from mmdiff.metrics.image import psnr, ssim
from mmdiff.metrics.segmentation import segmentation
from mmdiff.modalities import Condition, Dense, Embedding, Image, Label, Mask

Scorer = Callable[[Condition, Tensor, Tensor], dict[str, Any]]


def label(modality: Label, predicted: Tensor, truth: Tensor) -> dict[str, Any]:
    """Accuracy, macro precision and macro recall."""
    return classification(predicted, truth, modality.num_classes)


def mask(modality: Mask, predicted: Tensor, truth: Tensor) -> dict[str, Any]:
    """mIoU and pixel accuracy over labelled pixels, and the IoU of each class by its name, or else its raw id."""
    scores = segmentation(predicted, truth, modality.num_classes, modality.ignore)
    names = modality.names or list(map(str, modality.shown_ids))
    return scores | {"IoU per class": dict(zip(names, scores["IoU per class"], strict=True))}


def embedding(modality: Embedding, predicted: Tensor, truth: Tensor) -> dict[str, Any]:
    """Cosine and retrieval@1."""
    return retrieval(predicted, truth)


def dense(modality: Dense, predicted: Tensor, truth: Tensor) -> dict[str, Any]:
    """Root mean squared error per sample, in the data's own units."""
    return scored("RMSE", (predicted - truth).square().flatten(1).mean(dim=1).sqrt())


def image(modality: Image, predicted: Tensor, truth: Tensor) -> dict[str, Any]:
    """PSNR and SSIM."""
    return scored("PSNR", psnr(predicted, truth)) | scored("SSIM", ssim(predicted, truth))


SCORERS: dict[type[Condition], Scorer] = {Label: label, Mask: mask, Embedding: embedding, Dense: dense, Image: image}


def scorer(modality: Condition) -> Scorer | None:
    """That of the modality's class or of the nearest class above it; None where values of it are not compared."""
    return next((SCORERS[cls] for cls in type(modality).__mro__ if cls in SCORERS), None)
