"""Vectors (CLIP or any other): E maps the direction linearly, the head is von Mises–Fisher, with the norm beside it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import normalize, softplus

from mmdiff.errors import InputError
from mmdiff.likelihoods import Gaussian, vmf_log_prob, vmf_mean_length, vmf_sample
from mmdiff.modalities.base import Shape
from mmdiff.modalities.diffusible import Diffusible
from mmdiff.modalities.files import as_vector, check_numbers, open_numbers
from mmdiff.modalities.grids import repeatable, repeated
from mmdiff.modalities.heads import widened

_ROWS = 10_000  # that the norm's statistics are read from


class Embedding(Diffusible):
    """A vector whose direction matters; its value is (dim,) float32, not normalised.

    The encoder maps the direction x / ‖x‖ linearly into the diffusion space. The likelihood is von Mises–Fisher of the
    direction, times a Gaussian of log ‖x‖. An observed vector joins the backbone's context.

    Args:
        shape: the surroundings, see `Modality`.
        dim: length of the vector.
        log_norm_mean: of log ‖x‖ over the data; read from its first rows.
        log_norm_std: the same. Below 1e-3 the norm counts as constant and is not learned.
        concentration: of the von Mises–Fisher distribution. Default: predicted per sample. A number makes the loss a
            scaled cosine.
        map_size: side of the encoding's grid, repeated to the size of the diffusion space. Default: the full size.
    """

    def __init__(
        self,
        shape: Shape,
        dim: int,
        log_norm_mean: float = 0.0,
        log_norm_std: float = 0.0,
        concentration: float | None = None,
        map_size: int | None = None,
    ) -> None:
        super().__init__(shape)
        if log_norm_std < 0:
            raise InputError("log_norm_std", log_norm_std, "is a standard deviation, 0 or more")
        if dim < 2:
            raise InputError("dim", dim, "a direction needs at least two dimensions")
        if concentration is not None and not concentration > 0:
            raise InputError("concentration", concentration, "must be positive; leave it out to predict it")
        channels, (rows, columns) = shape.space[0], repeatable("map_size", map_size, shape.space)
        self.dim, self.grid, self.concentration = dim, (channels, rows, columns), concentration
        self.log_norm_mean, self.log_norm_std = log_norm_mean, max(log_norm_std, 1e-3)
        self.constant_norm = log_norm_std < 1e-3
        self.map = nn.Parameter(torch.empty(channels * rows * columns, dim))
        nn.init.orthogonal_(self.map)  # as near to an isometry as the sizes allow
        self.head = nn.Sequential(
            nn.LayerNorm(shape.pooled),
            nn.Linear(shape.pooled, 2 * shape.pooled),
            nn.SiLU(),
            nn.Linear(2 * shape.pooled, dim + 3),
        )

    @classmethod
    def settings_from_data(cls, feature: Any, values: Iterable[Any], **_: Any) -> dict[str, Any]:
        vectors = [_vector(v) for v in itertools.islice((v for v in values if v is not None), _ROWS)]
        if not vectors:
            raise InputError("embedding", None, "the column is empty; check data.columns")
        if len({len(v) for v in vectors}) > 1:
            raise InputError("embedding", sorted({len(v) for v in vectors}), "vectors of one column need one length")
        logs = np.log([np.linalg.norm(v) for v in vectors])
        return {"dim": len(vectors[0]), "log_norm_mean": float(logs.mean()), "log_norm_std": float(logs.std())}

    @classmethod
    def check_readable(cls, raw: Any) -> None:
        _vector(raw)

    def preprocess(self, raw: Any) -> Tensor:
        vector = _vector(raw)
        if len(vector) != self.dim:
            raise InputError("embedding", f"{len(vector)} numbers", f"expected {self.dim}")
        return torch.from_numpy(vector.astype(np.float32))

    def parse(self, text: str) -> Any:
        """A .npy or .json file, or numbers with commas."""
        return open_numbers("embedding", text)

    def check(self, value: Tensor) -> None:
        super().check(value)
        if not (value.isfinite().all() and (value.norm(dim=1) > 0).all()):
            raise InputError("embedding", "a vector", "must be finite and not zero: it has no direction")

    def check_observed(self, value: Tensor) -> None:
        check_numbers("embedding", "a vector", value.double().norm(dim=1))

    @property
    def value_shape(self) -> tuple[int, ...]:
        return (self.dim,)

    def placeholder(self) -> Tensor:
        return torch.full((self.dim,), math.exp(self.log_norm_mean) / math.sqrt(self.dim))

    def examples(self, count: int, generator: Generator) -> Tensor:
        directions = normalize(torch.randn(count, self.dim, generator=generator), dim=1)
        return directions * self._norm(torch.randn(count, 1, generator=generator))

    def _norm(self, standardised: Tensor) -> Tensor:
        """Standardised log norm -> norm; a constant one stays what it is."""
        spread = 0.0 if self.constant_norm else self.log_norm_std
        return (self.log_norm_mean + spread * standardised).exp()

    def _standardised_log_norm(self, value: Tensor) -> Tensor:
        return (value.norm(dim=1, keepdim=True).log() - self.log_norm_mean) / self.log_norm_std  # (B, 1)

    def _spread(self, mapped: Tensor) -> Tensor:
        """(B, C · rows · columns) -> (B, C, H, W)."""
        grid = mapped.reshape(-1, *self.grid)
        return repeated(grid, self.shape.space[1:])

    def encode(self, value: Tensor) -> Tensor:
        mapped = normalize(value, dim=1) @ widened(self.map).T  # (B, C · rows · columns)
        return self._spread(mapped / mapped.square().mean(dim=1, keepdim=True).add(1e-12).sqrt())

    observation_channels = 0  # a vector has no place in space

    @property
    def context_width(self) -> int:
        return self.dim + 1

    def context(self, value: Tensor) -> Tensor:
        """Direction and standardised log norm."""
        direction = normalize(value, dim=1) * math.sqrt(self.dim)  # unit scale per number
        norm = torch.zeros_like(value[:, :1]) if self.constant_norm else self._standardised_log_norm(value)
        return torch.cat([direction, norm], dim=1)

    def decode(self, features: Tensor, pooled: Tensor) -> Tensor:
        """(B, D + 3): mean direction (any length), κ through softplus, mean and log σ of the standardised log norm."""
        return self.head(pooled)

    def _distributions(self, params: Tensor) -> tuple[Tensor, Tensor, Gaussian]:
        """(mean direction (B, D), concentration (B,), distribution of the standardised log norm (B, 1))."""
        direction = normalize(params[:, : self.dim], dim=1)
        concentration = self.dim * softplus(params[:, self.dim]).clamp(1e-3, 1e3)
        if self.concentration is not None:
            concentration = torch.full_like(concentration, self.concentration)
        mean, log_std = params[:, self.dim + 1 : self.dim + 2], params[:, self.dim + 2 :].clamp(-5.0, 2.0)
        return direction, concentration, Gaussian(mean, (2 * log_std).exp())

    def nll(self, params: Tensor, value: Tensor) -> Tensor:
        """−log density of (direction, log ‖x‖), the sphere's surface and d log ‖x‖ being the measure, divided by D."""
        direction, concentration, norm = self._distributions(params)
        nll = -vmf_log_prob(direction, concentration, normalize(value, dim=1))  # (B,)
        if not self.constant_norm:
            nll = nll - norm.log_prob(self._standardised_log_norm(value)) + math.log(self.log_norm_std)
        return nll / self.dim

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (self.dim + 2,)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        direction, concentration, norm = self._distributions(params)
        drawn = vmf_sample(direction, concentration, noise[:, : self.dim + 1])
        return drawn * self._norm(norm.sample(noise[:, -1:]))

    def mode(self, params: Tensor) -> Tensor:
        direction, _, norm = self._distributions(params)
        return direction * self._norm(norm.mean)

    def average(self, params: list[Tensor]) -> Tensor:
        """Directions count alike, however long they are predicted."""
        return super().average(
            [torch.cat([normalize(p[:, : self.dim], dim=1), p[:, self.dim :]], dim=1) for p in params]
        )

    def expected_encoding(self, params: Tensor) -> Tensor:
        """W E[x] over √(E‖W x‖² / n): exact where W is an isometry, and nearly so where ‖W x‖ hardly varies."""
        direction, concentration, _ = self._distributions(params)
        mean = vmf_mean_length(self.dim, concentration)[:, None]  # A_d(κ), (B, 1)
        along = 1 - (self.dim - 1) * mean / concentration[:, None]  # E[w²] of w = μᵀx
        across = (1 - along) / (self.dim - 1)
        weights = widened(self.map)
        mapped = direction @ weights.T  # (B, n)
        square = mapped.square().sum(dim=1, keepdim=True)
        total = along * square + across * (weights.square().sum() - square)  # E‖W x‖²
        return self._spread(mean * mapped / (total / mapped.shape[1]).sqrt())

    def check_diffused(self) -> None:
        if self.concentration is not None:  # the head's mean vector would have a length that nobody learned
            raise InputError("concentration", self.concentration, "must be predicted where diffused; leave it out")

    def expected_signal(self, params: Tensor) -> Tensor:
        """√D A_D(κ) μ, and the mean of the standardised log norm."""
        direction, concentration, norm = self._distributions(params)
        length = math.sqrt(self.dim) * vmf_mean_length(self.dim, concentration)[:, None]
        return torch.cat([length * direction, norm.mean * (not self.constant_norm)], dim=1)


def _vector(raw: Any) -> np.ndarray:
    vector = as_vector("embedding", raw)
    with np.errstate(over="ignore"):
        check_numbers("embedding", "a vector", np.linalg.norm(vector))
    if not np.linalg.norm(vector.astype(np.float32)) > np.finfo(np.float32).tiny:  # as torch will compute it
        raise InputError("embedding", "a vector", "must be finite and not zero: it has no direction (in float32)")
    return vector
