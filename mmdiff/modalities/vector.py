"""Vectors of numbers (rows of a table): standardised or ranked; E is linear, the head a Gaussian per number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from mmdiff.errors import InputError
from mmdiff.likelihoods import Gaussian
from mmdiff.modalities.base import ONLY_ALL_ROWS, Shape
from mmdiff.modalities.diffusible import Diffusible
from mmdiff.modalities.files import as_vector, check_numbers, open_numbers
from mmdiff.modalities.grids import repeatable, repeated
from mmdiff.modalities.heads import widened

TRANSFORMS = ("standardise", "ranks")
_KNOTS = 65  # quantiles that ranks are read from
_EDGE = 1e-3  # ranks stay away from 0 and 1, where a Gaussian has no finite value
_LARGEST_WHOLE = 2**24  # float32 has every whole number up to it


class Vector(Diffusible):
    """Numbers; its value is (dim,) float32 in the data's own units. A column of single numbers has dim 1.

    The model works on standardised numbers: (x − mean)/std, or with `transform: ranks` the standard normal quantile of
    the number's rank in the data, for skewed or bounded numbers. If the direction of the vector matters, see
    `Embedding`.

    Args:
        shape: the surroundings, see `Modality`.
        dim: how many numbers.
        transform: "standardise" or "ranks"; draws by ranks stay inside the range of the data.
        mean: of each number over the data, read from it by default.
        std: of each number over the data, read from it by default; 1 for a constant number.
        quantiles: (dim, knots) of the data, for ranks; read from it by default.
        map_size: side of the encoding's grid, repeated to the size of the diffusion space. Default: the full size.
    """

    def __init__(
        self,
        shape: Shape,
        dim: int,
        transform: str = "standardise",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        quantiles: list[list[float]] | None = None,
        map_size: int | None = None,
    ) -> None:
        super().__init__(shape)
        if dim < 1:
            raise InputError("dim", dim, "needs at least one number")
        if transform not in TRANSFORMS:
            raise InputError("transform", transform, f"choose one of {', '.join(TRANSFORMS)}")
        channels, (rows, columns) = shape.space[0], repeatable("map_size", map_size, shape.space)
        self.dim, self.grid, self.ranks = dim, (channels, rows, columns), transform == "ranks"
        if self.ranks and quantiles is None:
            raise InputError("quantiles", None, "ranks need the data's quantiles; leave them to the data")
        self._keep("mean", mean or [0.0] * dim, (dim,))
        self._keep("std", std or [1.0] * dim, (dim,))
        knots = len(quantiles[0]) if quantiles else 2
        self._keep("quantiles", quantiles or [[0.0, 1.0]] * dim, (dim, knots))
        if not bool((self.std > 0).all()):
            raise InputError("std", std, "must be positive")
        self.map = nn.Parameter(torch.empty(channels * rows * columns, dim))
        nn.init.orthogonal_(self.map)
        self.head = nn.Sequential(
            nn.LayerNorm(shape.pooled),
            nn.Linear(shape.pooled, 2 * shape.pooled),
            nn.SiLU(),
            nn.Linear(2 * shape.pooled, 2 * dim),
        )

    def _keep(self, name: str, numbers: Any, shape: tuple[int, ...]) -> None:
        """A setting as a buffer, which is not saved: the config holds it."""
        buffer = torch.tensor(numbers, dtype=torch.float32)
        if tuple(buffer.shape) != shape or not bool(buffer.isfinite().all()):
            raise InputError(name, numbers, f"needs finite numbers of shape {shape}")
        self.register_buffer(name, buffer, persistent=False)

    @classmethod
    def settings_from_data(
        cls, feature: Any, raws: Iterable[Any], /, transform: str = "standardise", **settings: Any
    ) -> dict[str, Any]:
        vectors = [_vector(raw) for raw in raws if raw is not None and not _is_nan(raw)]
        if not vectors:
            raise InputError("vector", None, "the column is empty; check data.columns")
        if len(lengths := sorted({len(vector) for vector in vectors})) > 1:
            raise InputError("vector", lengths, "vectors of one column need one length")
        rows = np.stack(vectors).astype(np.float64)
        std = np.where(rows.std(axis=0) > 0, rows.std(axis=0), 1.0)
        result = {"dim": rows.shape[1], "mean": rows.mean(axis=0).tolist(), "std": std.tolist()}
        if transform == "ranks":
            result["quantiles"] = np.quantile(rows, np.linspace(0, 1, _KNOTS), axis=0).T.tolist()
        return result

    @classmethod
    def settings_from_stream(cls, feature: Any, transform: str = "standardise", **settings: Any) -> dict[str, Any]:
        for name in ("mean", "std", *(["quantiles"] if transform == "ranks" else [])):
            if settings.get(name) is None:
                raise InputError(name, None, ONLY_ALL_ROWS)
        return {}

    @classmethod
    def check_readable(cls, raw: Any) -> None:
        if not _is_nan(raw):
            _vector(raw)

    def preprocess(self, raw: Any) -> Tensor:
        vector = _vector(raw)
        if len(vector) != self.dim:
            raise InputError("vector", f"{len(vector)} numbers", f"expected {self.dim}")
        return torch.from_numpy(vector.astype(np.float32))

    def check_observed(self, value: Tensor) -> None:
        check_numbers("vector", "a vector", value)

    def parse(self, text: str) -> Any:
        """A .npy or .json file, or numbers with commas."""
        return open_numbers("vector", text)

    @property
    def value_shape(self) -> tuple[int, ...]:
        return (self.dim,)

    def placeholder(self) -> Tensor:
        return self.inverse(torch.zeros(1, self.dim))[0].detach().cpu()

    def examples(self, count: int, generator: Generator) -> Tensor:
        return self.inverse(torch.randn(count, self.dim, generator=generator).to(self.mean.device)).cpu()

    def transform(self, value: Tensor) -> Tensor:
        """x -> s = T(x), (B, D)."""
        if not self.ranks:
            return (value - self.mean.to(value)) / self.std.to(value)
        quantiles = self._increasing().to(value.device)
        rank = _interpolated(quantiles, self._levels().to(value.device), value.double())
        return torch.special.ndtri(rank.clamp(_EDGE, 1 - _EDGE)).to(value.dtype)

    def inverse(self, standardised: Tensor) -> Tensor:
        """s -> x, the inverse of `transform` inside the data's range."""
        if not self.ranks:
            return self.mean.to(standardised) + self.std.to(standardised) * standardised
        rank = torch.special.ndtr(standardised.double())
        quantiles = self._increasing().to(standardised.device)
        return _interpolated(self._levels().to(standardised.device), quantiles, rank).to(standardised.dtype)

    def _increasing(self) -> Tensor:
        """Quantiles (D, knots) float64; repeated ones are set apart by a hair, so that they can be inverted."""
        quantiles = self.quantiles.double()
        spread = (quantiles[:, -1:] - quantiles[:, :1]).clamp(min=1e-6)
        return quantiles + spread * 1e-7 * torch.arange(quantiles.shape[1], device=quantiles.device)

    def _levels(self) -> Tensor:
        knots = self.quantiles.shape[1]
        return torch.linspace(0, 1, knots, dtype=torch.float64).expand(self.dim, knots).contiguous()

    def encode(self, value: Tensor) -> Tensor:
        return self._encode(self.transform(value))

    def _encode(self, standardised: Tensor) -> Tensor:
        """Linear, with mean square 1 over standardised data."""
        weights = widened(self.map)
        unit = weights * (len(weights) ** 0.5 / weights.norm().add(1e-12))
        return repeated((standardised @ unit.T).reshape(-1, *self.grid), self.shape.space[1:])

    observation_channels = 0  # a vector has no place in space

    @property
    def context_width(self) -> int:
        return self.dim

    def context(self, value: Tensor) -> Tensor:
        return self.transform(value)

    def decode(self, features: Tensor, pooled: Tensor) -> Tensor:
        """(B, 2 D): means and log σ of the transformed numbers."""
        return self.head(pooled)

    def _distribution(self, params: Tensor) -> Gaussian:
        mean, log_std = params.chunk(2, dim=1)
        return Gaussian(mean, (2 * log_std.clamp(-7.0, 3.0)).exp())

    def nll(self, params: Tensor, value: Tensor) -> Tensor:
        """Of x in its own units where it is standardised, of the normal quantiles of its ranks otherwise."""
        nll = -self._distribution(params).log_prob(self.transform(value)) / self.dim
        return nll if self.ranks else nll + float(self.std.double().log().mean())

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        return self.inverse(self._distribution(params).sample(noise))

    def mode(self, params: Tensor) -> Tensor:
        return self.inverse(self._distribution(params).mean)

    def expected_encoding(self, params: Tensor) -> Tensor:
        return self._encode(self._distribution(params).mean)

    def expected_signal(self, params: Tensor) -> Tensor:
        return self._distribution(params).mean


def _interpolated(before: Tensor, after: Tensor, value: Tensor) -> Tensor:
    """Piecewise linear from knots ``before`` to ``after``, both (D, knots) and increasing, of ``value`` (B, D)."""
    columns = value.T.contiguous()  # (D, B)
    place = torch.searchsorted(before, columns).clamp(1, before.shape[1] - 1)
    low, high = before.gather(1, place - 1), before.gather(1, place)
    share = ((columns - low) / (high - low)).clamp(0, 1)
    start, end = after.gather(1, place - 1), after.gather(1, place)
    return (start + share * (end - start)).T


def _is_nan(raw: Any) -> bool:
    return isinstance(raw, float) and math.isnan(raw)


def _vector(raw: Any) -> np.ndarray:
    """A list, an array or one number as (D,) float64."""
    number = isinstance(raw, int | float | np.number | Decimal) and not isinstance(raw, bool)
    vector = as_vector("vector", [raw] if number else raw)
    check_numbers("vector", "a vector", vector)
    lost = (vector != vector.astype(np.float32)) & (vector == vector.round()) & (np.abs(vector) > _LARGEST_WHOLE)
    if lost.any():
        remedy = "is a whole number that float32 rounds; leave ids out, give quantities in a larger unit"
        raise InputError("vector", int(vector[lost.argmax()]), remedy)
    return vector
