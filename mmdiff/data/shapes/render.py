"""A procedural data set with exact truth for every modality: one coloured shape on a dark background.

A row is a pure function of (seed, split, index); only the selected columns are generated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import datasets
import numpy as np
from PIL import Image

from mmdiff.data.generated_rows import MadeRows
from mmdiff.errors import InputError
from mmdiff.randomness import fold

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = ("red", "yellow", "green", "cyan", "blue", "magenta")
RGB = np.array([[230, 30, 30], [230, 230, 30], [30, 230, 30], [30, 230, 230], [30, 30, 230], [230, 30, 230]], float)
RADIUS = (0.2, 0.36)
EMBEDDING_SIZE = 32
CONCENTRATION = 1000.0  # κ of the von Mises–Fisher distribution of directions; the mean cosine is 0.985
NORM_MEDIAN, NORM_LOG_STD = 10.0, 0.1  # of the log-normal distribution of norms
_GREYS = (20.0, 45.0, 70.0)
_GRADIENT = 12.0  # largest difference from the middle of a background to its border
OCCLUDER = 128


class Thing(NamedTuple):
    """Attributes of objects, each a number or an array; x, y and radius are parts of the image's side.

    ``radius`` is half the side of the bounding square around the centre (x, y); y points down.
    """

    label: Any
    color: Any
    x: Any
    y: Any
    radius: Any


# ------------------------------------------------------------------------------------------------------------- drawing


def coverage(label: int, x: Any, y: Any, radius: Any, size: int) -> np.ndarray:
    """How much of every pixel a shape covers, in [0, 1]: (..., size, size) for x, y, radius of shape (...)."""
    centres = (np.arange(size) + 0.5) / size
    x, y, radius = (np.asarray(value)[..., None, None] for value in (x, y, radius))
    distance = _signed_distance(label, (centres[None, :] - x) / radius, (centres[:, None] - y) / radius)
    return np.clip(0.5 - distance * (radius * size), 0.0, 1.0)


def _signed_distance(label: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """To the border of a shape in the square [−1, 1]², negative inside; exact but near corners."""
    name = SHAPES[label]
    if name == "circle":
        return np.hypot(u, v) - 1
    if name == "ring":
        return np.abs(np.hypot(u, v) - 0.75) - 0.25
    across, down = np.abs(u), np.abs(v)
    if name == "square":
        return np.maximum(across, down) - 1
    if name == "triangle":  # the tip at (0, −1), the base from (−1, 1) to (1, 1)
        return np.maximum((2 * across - v - 1) / np.sqrt(5), v - 1)
    bars = np.maximum(across - 1, down - 1 / 3), np.maximum(across - 1 / 3, down - 1)
    return np.minimum(*bars)


def render(thing: Thing, backdrop: np.ndarray, size: int, surface: float | np.ndarray = 1.0) -> np.ndarray:
    """(size, size, 3) uint8; ``backdrop`` is three uniform numbers, ``surface`` the object's brightness, by pixel."""
    level, slopes = _GREYS[int(backdrop[0] * len(_GREYS))], backdrop[1:] * 2 - 1
    ramp = (np.arange(size) + 0.5) / size * 2 - 1
    grey = level + (_GRADIENT / 2) * (slopes[0] * ramp[:, None] + slopes[1] * ramp)
    alpha = coverage(thing.label, thing.x, thing.y, thing.radius, size)
    pixels = (grey * (1 - alpha))[..., None] + (surface * alpha)[..., None] * RGB[thing.color]
    return np.rint(pixels).astype(np.uint8)


def _occlude(pixels: np.ndarray, thing: Thing, choice: int) -> None:
    """Grey over one of four halves or four quarters of the object, from its centre to the image's border."""
    row, column = (int(round(part * len(pixels))) for part in (thing.y, thing.x))
    above, below, left, right, whole = (slice(row), slice(row, None), slice(column), slice(column, None), slice(None))
    halves = [(above, whole), (below, whole), (whole, left), (whole, right)]
    quarters = [(above, left), (above, right), (below, left), (below, right)]
    pixels[[*halves, *quarters][choice]] = OCCLUDER


def caption(thing: Thing) -> str:
    """For example "a small red circle at the top left"."""
    low, high = RADIUS
    extent = ("small", "medium", "large")[min(int(3 * (thing.radius - low) / (high - low)), 2)]
    words = [names[(part > 0.42) + (part > 0.58)] for names, part in ((_DOWN, thing.y), (_ACROSS, thing.x))]
    place = " ".join(word for word in words if word)
    position = f"at the {place}" if place else "in the centre"
    return f"a {extent} {COLORS[thing.color]} {SHAPES[thing.label]} {position}"


_DOWN, _ACROSS = ("top", "", "bottom"), ("left", "", "right")

# ---------------------------------------------------------------------------------------------------- random numbers


def row_uniform(key: int, index: int, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) of one row: (count,). NumPy promises the raw words of Philox, not its other draws."""
    words = np.random.Philox(key=[key, index]).random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53


def _normal(uniform: np.ndarray) -> np.ndarray:
    """Box and Muller's transform: (2 k,) uniform -> (2 k,) standard normal numbers."""
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[0::2])), 2 * np.pi * uniform[1::2]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


def draw_place(uniform: np.ndarray) -> tuple[float, float, float]:
    """Three uniform numbers -> x, y, radius of an object inside the image."""
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * uniform[2]
    x, y = radius + uniform[:2] * (1 - 2 * radius)
    return float(x), float(y), float(radius)


# --------------------------------------------------------------------------------------------------------- embeddings

_INPUTS = len(SHAPES) + len(COLORS) + 3
_SCALES = np.array([1.5] * (len(SHAPES) + len(COLORS)) + [4.0, 4.0, 8.0])  # of one-hot shape and colour, x, y, radius
_WEIGHTS = _normal(row_uniform(fold(0, 0, "shapes/weights"), 0, EMBEDDING_SIZE * _INPUTS)).reshape(EMBEDDING_SIZE, -1)
_PHASES = 2 * np.pi * row_uniform(fold(0, 0, "shapes/phases"), 0, EMBEDDING_SIZE)


def mean_direction(thing: Thing) -> np.ndarray:
    """f(attributes), a unit vector of random Fourier features: (..., 32) for attributes of shape (...)."""
    one_hot = np.eye(len(SHAPES))[thing.label], np.eye(len(COLORS))[thing.color]
    place = np.stack([thing.x, thing.y, thing.radius], axis=-1)
    inputs = np.concatenate([*one_hot, place], axis=-1) * _SCALES  # (..., 14)
    features = np.cos(inputs @ _WEIGHTS.T + _PHASES)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def _cosine_quantiles() -> tuple[np.ndarray, np.ndarray]:
    """The distribution function of the cosine to the mean direction, and the cosines where it was evaluated."""
    edges = np.linspace(-1, 1, 2**15 + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    log_density = CONCENTRATION * middle + (EMBEDDING_SIZE - 3) / 2 * np.log1p(-(middle**2))
    mass = np.exp(log_density - log_density.max())
    kept = mass > 1e-12  # the rest is flat, and no number falls there
    probability = np.concatenate([[0.0], np.cumsum(mass[kept])])
    start = int(np.flatnonzero(kept)[0])
    return probability / probability[-1], edges[start : start + len(probability)]


_PROBABILITIES, _COSINES = _cosine_quantiles()


def _embedding(mean: np.ndarray, uniform: np.ndarray) -> list[float]:
    """A draw: direction ~ von Mises–Fisher(mean, κ), norm ~ log-normal, independent of it."""
    normal = _normal(uniform[1:])  # (34,): a tangent, the norm, one spare
    tangent = normal[:EMBEDDING_SIZE] - (normal[:EMBEDDING_SIZE] @ mean) * mean
    cosine = np.interp(uniform[0], _PROBABILITIES, _COSINES)
    direction = cosine * mean + np.sqrt(1 - cosine**2) / np.linalg.norm(tangent) * tangent
    norm = NORM_MEDIAN * np.exp(NORM_LOG_STD * normal[EMBEDDING_SIZE])
    return (norm * direction).astype(np.float32).tolist()


# --------------------------------------------------------------------------------------------------------------- rows


class Shapes(MadeRows):
    """Rows of one split.

    Columns: ``image`` (RGB), ``mask`` (L; 0 = background, 1 + colour), ``label`` (shape), ``color``, ``x``, ``y``,
    ``radius`` (parts of the side), ``caption``, ``embedding`` (32 floats) and ``views`` (RGB images of an object of
    the same shape and colour at other places, with half or a quarter of it covered by grey).

    Args:
        split: name of the stream of rows; streams are disjoint.
        rows: how many.
        size: side of all images in pixels.
        views: images in the column ``views``.
        seed: of the data set.
    """

    def __init__(self, split: str, rows: int, size: int, views: int, seed: int) -> None:
        super().__init__(rows, self.types)
        self.size, self.views = size, views
        self._keys = {name: fold(seed, 0, f"shapes/{split}/{name}") for name in ("object", "embedding", "views")}

    def make(self, row: int, names: list[str]) -> dict[str, Any]:
        uniform = row_uniform(self._keys["object"], row, 8)
        label, color = int(uniform[0] * len(SHAPES)), int(uniform[1] * len(COLORS))
        thing = Thing(label, color, *draw_place(uniform[2:5]))
        return {name: self.makers[name](self, row, thing, uniform[5:]) for name in names}

    def _image(self, row: int, thing: Thing, backdrop: np.ndarray) -> Image.Image:
        return Image.fromarray(render(thing, backdrop, self.size))

    def _mask(self, row: int, thing: Thing, backdrop: np.ndarray) -> Image.Image:
        inside = coverage(thing.label, thing.x, thing.y, thing.radius, self.size) > 0.5
        return Image.fromarray(np.where(inside, thing.color + 1, 0).astype(np.uint8))

    def _embedding(self, row: int, thing: Thing, backdrop: np.ndarray) -> list[float]:
        return _embedding(mean_direction(thing), row_uniform(self._keys["embedding"], row, EMBEDDING_SIZE + 3))

    def _views(self, row: int, thing: Thing, backdrop: np.ndarray) -> list[Image.Image]:
        images = []
        for uniform in row_uniform(self._keys["views"], row, 7 * self.views).reshape(self.views, 7):
            elsewhere = Thing(thing.label, thing.color, *draw_place(uniform[:3]))
            pixels = render(elsewhere, uniform[3:6], self.size)
            _occlude(pixels, elsewhere, int(uniform[6] * 8))
            images.append(Image.fromarray(pixels))
        return images

    #: How each column is made, from (rows, row number, thing, backdrop), and its type.
    makers: ClassVar[dict[str, Callable[[Any, int, Thing, np.ndarray], Any]]] = {
        "image": _image,
        "mask": _mask,
        "label": lambda rows, row, thing, backdrop: thing.label,
        "color": lambda rows, row, thing, backdrop: thing.color,
        "x": lambda rows, row, thing, backdrop: thing.x,
        "y": lambda rows, row, thing, backdrop: thing.y,
        "radius": lambda rows, row, thing, backdrop: thing.radius,
        "caption": lambda rows, row, thing, backdrop: caption(thing),
        "embedding": _embedding,
        "views": _views,
    }
    types: ClassVar[dict[str, Any]] = {
        "image": datasets.Image(),
        "mask": datasets.Image(),
        "label": datasets.ClassLabel(names=list(SHAPES)),
        "color": datasets.ClassLabel(names=list(COLORS)),
        "x": datasets.Value("float64"),
        "y": datasets.Value("float64"),
        "radius": datasets.Value("float64"),
        "caption": datasets.Value("string"),
        "embedding": datasets.List(datasets.Value("float32"), length=EMBEDDING_SIZE),
        "views": datasets.List(datasets.Image()),
    }


def load(
    rows: int = 20000, validation_rows: int = 1000, size: int = 32, views: int = 4, seed: int = 0
) -> dict[str, Shapes]:
    """{"train", "validation"}, see `Shapes`; more rows do not change the earlier ones.

    Raises:
        InputError: for no rows, a negative number of views, or a side below 16 pixels, at which shapes look alike.
    """
    for key, value, least in (("rows", rows, 1), ("validation_rows", validation_rows, 1), ("views", views, 0)):
        if value < least:
            raise InputError(key, value, f"needs at least {least}")
    if size < 16:
        raise InputError("size", size, "shapes need at least 16 pixels to differ")
    return {
        "train": Shapes("train", rows, size, views, seed),
        "validation": Shapes("validation", validation_rows, size, views, seed),
    }
