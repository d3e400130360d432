"""The inverse of the renderer: exact rules, without training, that read modalities from images of shapes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from mmdiff.data.shapes.render import COLORS, RADIUS, RGB, SHAPES, Thing, caption, coverage, mean_direction

_CHROMA = ((RGB - RGB.mean(axis=1, keepdims=True)) / 127.5).astype(np.float32)  # (6, 3); greys have none
# area of every shape and how far its centre of mass lies below its middle, in units of its radius
_AREA = np.array([np.pi, 4.0, 2.0, 20 / 9, 0.75 * np.pi])
_SHIFT = np.array([0.0, 0.0, 1 / 3, 0.0, 0.0])


def read_mask(images: Tensor) -> Tensor:
    """Images (n, 3, H, W) in [−1, 1] -> (n, H, W) int64: 0 = background, 1 + the colour nearest to the pixel's."""
    return torch.from_numpy(_mask(_chroma(images))).to(images.device)


def read_label(images: Tensor) -> Tensor:
    """Images (n, 3, H, W) in [−1, 1] -> (n,) int64, the shape whose silhouette fits best."""
    return torch.from_numpy(read_object(images).label).to(images.device)


def read_kind(images: Tensor) -> Tensor:
    """Images (n, 3, H, W) in [−1, 1] -> (n,) int64, shape and colour in one: label · 6 + colour."""
    thing = read_object(images)
    return torch.from_numpy(thing.label * len(COLORS) + thing.color).to(images.device)


def read_embedding(images: Tensor) -> Tensor:
    """Images (n, 3, H, W) in [−1, 1] -> (n, 32) float32, unit vectors, the embedding's mean direction."""
    return torch.from_numpy(mean_direction(read_object(images)).astype(np.float32)).to(images.device)


def read_caption(images: Tensor) -> list[str]:
    """Images (n, 3, H, W) in [−1, 1] -> what is in each, as the column ``caption`` says it."""
    thing = read_object(images)
    thing = thing._replace(radius=thing.radius.clip(*RADIUS))  # what else has no word
    return [caption(Thing(*attributes)) for attributes in zip(*(column.tolist() for column in thing))]


def read_description(images: Tensor) -> list[str]:
    """The same as the column ``description`` says it."""
    thing = read_object(images)
    return [f"a {COLORS[color]} {SHAPES[label]}" for label, color in zip(thing.label, thing.color)]


LEAST_IOU = 0.85
#: Rules that give raw values.
RAW_RULES: dict[str, Callable[[Tensor], list[str]]] = {"caption": read_caption, "description": read_description}
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "mask": read_mask,
    "label": read_label,
    "kind": read_kind,
    "embedding": read_embedding,
}


def whole_masks(masks: Tensor) -> Tensor:
    """Masks (n, H, W) of class ids -> (n,) bool: one object of one class, in one piece, with a shape's silhouette.

    The rule judges a mask by itself, without the image. A silhouette fits if the intersection over union with that of
    the best shape at the mask's place is `LEAST_IOU` or more; of 20 000 real masks of 32 pixels the least is 0.876.
    """
    ids = masks.detach().cpu().numpy()
    found = ids > 0
    one_class = np.array([len(np.unique(one[there])) == 1 for one, there in zip(ids, found)], dtype=bool)
    one_piece = np.array([ndimage.label(there, np.ones((3, 3)))[1] == 1 for there in found], dtype=bool)
    alpha = found.astype(np.float64)
    fits = [_overlap(found, label, *place) for label, place in enumerate(_places(alpha))]
    return torch.from_numpy(one_class & one_piece & (np.max(fits, axis=0) >= LEAST_IOU)).to(masks.device)


def _overlap(found: np.ndarray, label: int, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Intersection over union of masks (n, size, size) and a shape's silhouettes: (n,)."""
    silhouette = coverage(label, x, y, np.maximum(radius, 1e-6), found.shape[-1]) > 0.5
    return (found & silhouette).sum(axis=(1, 2)) / np.maximum((found | silhouette).sum(axis=(1, 2)), 1)


def read_object(images: Tensor) -> Thing:
    """Images (n, 3, H, W) in [−1, 1] -> the attributes of the object in each: arrays (n,).

    The area and the centre of mass of the object's colour place the silhouette of every shape. The shape with the best
    fit is chosen. An image without an object gets arbitrary attributes.
    """
    chroma = _chroma(images)
    mask = _mask(chroma)  # (n, H, W)
    count = np.stack([(mask == color + 1).sum(axis=(1, 2)) for color in range(len(COLORS))], axis=1)
    color = count.argmax(axis=1)  # (n,)
    pure = _CHROMA[color]  # (n, 3)
    alpha = np.einsum("nchw,nc->nhw", chroma, pure) / (pure**2).sum(axis=1)[:, None, None]
    near = ndimage.binary_dilation(mask == color[:, None, None] + 1, np.ones((1, 3, 3)))
    alpha = np.where(near, alpha, 0.0)  # noise of the background would change the moments
    places = _places(alpha)
    errors = [_misfit(alpha, label, *places[label]) for label in range(len(SHAPES))]
    label = np.argmin(errors, axis=0)  # (n,)
    x, y, radius = np.array(places)[label, :, np.arange(len(label))].T
    return Thing(label, color, x, y, radius)


def _chroma(images: Tensor) -> np.ndarray:
    """Differences of pixels from grey: (n, 3, H, W)."""
    pixels = images.detach().cpu().float().numpy()
    return pixels - pixels.mean(axis=1, keepdims=True)


def _mask(chroma: np.ndarray) -> np.ndarray:
    # nearest of grey (0) and the six colours c: the largest of 0 and <pixel, c> − |c|²/2
    scores = np.einsum("nchw,kc->nkhw", chroma, _CHROMA) - (_CHROMA**2).sum(axis=1)[:, None, None] / 2
    return np.where(scores.max(axis=1) > 0, scores.argmax(axis=1) + 1, 0)


def _places(alpha: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """x, y and radius, (n,) each, that every shape needs to have the mass and the centre of mass of alpha (n, H, W)."""
    height, width = alpha.shape[1:]
    area = np.maximum(alpha.sum(axis=(1, 2)), 1.0)  # pixels
    x = alpha.sum(axis=1) @ ((np.arange(width) + 0.5) / width) / area
    y = alpha.sum(axis=2) @ ((np.arange(height) + 0.5) / height) / area
    radii = [np.sqrt(area / (height * width * unit)) for unit in _AREA]
    return [(x, y - shift * radius, radius) for shift, radius in zip(_SHIFT, radii)]


def _misfit(alpha: np.ndarray, label: int, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Squared difference between alpha (n, size, size) and a shape's silhouettes: (n,)."""
    return ((alpha - coverage(label, x, y, radius, alpha.shape[-1])) ** 2).sum(axis=(1, 2))
