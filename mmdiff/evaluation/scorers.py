"""How values of a kind are compared: one scorer per modality class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmdiff.metrics.bootstrap import scored
from mmdiff.metrics.classification import classification, retrieval
from mmdiff.metrics.image import psnr, ssim
from mmdiff.metrics.segmentation import segmentation
from mmdiff.metrics.text import captions, perplexity
from mmdiff.modalities import Condition, Dense, Embedding, Image, Label, Mask, Text

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


def text(modality: Text, predicted: Tensor, truth: Tensor) -> dict[str, Any]:
    """Exact match, each of `attributes`, BLEU and the character error rate."""
    return captions(modality.postprocess(predicted), modality.postprocess(truth), modality.attributes)


def text_likelihood(modality: Text, params: Tensor, truth: Tensor) -> dict[str, Any]:
    """Perplexity per token, and nats per text."""
    with torch.no_grad():
        nats = modality.token_nll(params, truth.to(params.device)).sum(dim=1).cpu()
    tokens = ((truth != modality.end).sum(dim=1) + 1).clamp(max=modality.max_tokens)
    return perplexity(nats.double().numpy(), tokens.double().numpy())


SCORERS: dict[type[Condition], Scorer] = {
    Label: label,
    Mask: mask,
    Embedding: embedding,
    Dense: dense,
    Image: image,
    Text: text,
}
#: How likely the truth is: (modality, params of its head, truth) -> scores, of the classes for which it is reported.
LIKELIHOODS: dict[type[Condition], Scorer] = {Text: text_likelihood}


def scorer(modality: Condition) -> Scorer | None:
    """That of the modality's class or of the nearest class above it; None where values of it are not compared."""
    return _of(SCORERS, modality)


def likelihood(modality: Condition) -> Scorer | None:
    """The same of `LIKELIHOODS`."""
    return _of(LIKELIHOODS, modality)


def _of(scorers: dict[type[Condition], Scorer], modality: Condition) -> Scorer | None:
    return next((scorers[cls] for cls in type(modality).__mro__ if cls in scorers), None)
