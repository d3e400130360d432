"""The contract of a modality: one set of laws for all. A new modality adds one entry to CASES."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import datasets
import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from scipy.stats import vonmises_fisher
from torch import Generator, Tensor
from torch.distributions import Categorical, Independent, Normal
from torch.nn.functional import softplus

from mmdiff.errors import InputError
from mmdiff.modalities import (
    MODALITIES,
    Dense,
    Embedding,
    Image,
    ImageSet,
    Label,
    Mask,
    MaskedImage,
    Modality,
    Shape,
    Text,
    Vector,
)
from mmdiff.modalities.contract import LAWS, check_modality

FEATURES, POOLED = 6, 10
LEVELS = 256
UNIFORM_RMS = math.sqrt((LEVELS + 1) / (LEVELS - 1) / 3)  # of the uniform law on 256 even points in [−1, 1]
CLASSES, DIM = 5, 6
LOG_NORM, LOG_NORM_STD = 1.2, 0.3
DEPTH, DEPTH_STD = 40.0, 2.5

Values = Callable[[int, Generator], Tensor]


class Law(Protocol):
    """p(x | params) by another library, a row of params each: (B,)."""

    def log_prob(self, value: Tensor) -> Tensor: ...

    def entropy(self) -> Tensor: ...


def as_is(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Case:
    name: str
    space: tuple[int, int, int]
    build: Callable[[Shape], Modality]
    values: Values  # random values, as the data would have them
    raws: list[Any]  # valid raw values
    feature: Any  # of a data set's column that holds the raws
    law: Callable[[Tensor], Law]
    text: Callable[[Any, Path], str]  # what a person types for a raw value
    same: Callable[[Any, Any], bool] = operator.eq
    stride: int = 1  # of the feature map
    asked: Callable[[Tensor], Tensor] = as_is  # a draw -> the value whose nll is that of the whole draw
    redundant: int = 0  # outputs of the head that the settings leave without effect

    @property
    def shape(self) -> Shape:
        return Shape(self.space, FEATURES, POOLED, self.stride)


# ------------------------------------------------------------------------------------------------------- images


def images(channels: int) -> Values:
    def draw(count: int, generator: Generator) -> Tensor:
        return torch.randint(LEVELS, (count, channels, 8, 8), generator=generator) / 127.5 - 1.0

    return draw


def grey_blocks(count: int, generator: Generator) -> Tensor:
    """RGB, 16×16, of one grey in every 2×2 pixels: the averages that an 8×8 space holds lose nothing."""
    return images(1)(count, generator).repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)


def pictures(*shape: int, below: int = LEVELS) -> list[PILImage.Image]:
    pixels = np.random.default_rng(0).integers(below, size=(3, *shape), dtype=np.uint8)
    return [PILImage.fromarray(array) for array in pixels]


def image_law(params: Tensor) -> Law:
    return Independent(Normal(params[:, :-1], params[:, -1:].exp()), 3)


def saved(raw: PILImage.Image, folder: Path) -> str:
    raw.save(folder / "raw.png")
    return str(folder / "raw.png")


def _image(channels: int, size: int = 8) -> Callable[[Shape], Modality]:
    return lambda shape: Image(shape, channels=channels, size=size, scale=1 / UNIFORM_RMS)


# ------------------------------------------------------------------------------------------------ masked images


class HoleLaw(NamedTuple):
    """Of the pixels in the hole; a draw is a whole image, and its entropy that of all pixels."""

    pixels: Normal

    def log_prob(self, value: Tensor) -> Tensor:
        hole = (value[:, -1] == 0)[:, None].expand_as(self.pixels.mean)
        log_prob = self.pixels.log_prob(value[:, :-1])
        return torch.stack([row[where].sum() for row, where in zip(log_prob, hole, strict=True)])

    def entropy(self) -> Tensor:
        return self.pixels.entropy().sum(dim=(1, 2, 3))


def hole_law(params: Tensor) -> Law:
    return HoleLaw(Normal(params[:, :-1], params[:, -1:].exp().expand_as(params[:, :-1])))


def masked(size: int) -> Values:
    def draw(count: int, generator: Generator) -> Tensor:
        pixels = torch.randint(LEVELS, (count, 3, size, size), generator=generator) / 127.5 - 1.0
        known = (torch.rand(count, 1, size, size, generator=generator) < 0.6).float()
        return torch.cat([pixels * known, known], dim=1)

    return draw


def hidden_everywhere(value: Tensor) -> Tensor:
    return torch.cat([value[:, :-1], torch.zeros_like(value[:, -1:])], dim=1)


def masked_pictures(size: int) -> list[PILImage.Image]:
    """RGBA, known or not; what is hidden is the grey that an unknown pixel is shown as."""
    pixels = np.random.default_rng(0).integers(LEVELS, size=(3, size, size, 4), dtype=np.uint8)
    pixels[..., 3] = np.where(pixels[..., 3] < 100, 0, 255)
    pixels[pixels[..., 3] == 0] = (128, 128, 128, 0)
    return [PILImage.fromarray(array) for array in pixels]


def _masked_image(size: int, fill: str = "zero") -> Callable[[Shape], Modality]:
    return lambda shape: MaskedImage(shape, channels=3, size=size, fill=fill)


# ------------------------------------------------------------------------------------------------------- labels


def labels(count: int, generator: Generator) -> Tensor:
    return torch.randint(CLASSES, (count,), generator=generator)


def label_law(params: Tensor) -> Law:
    return Categorical(logits=params)


def _label(shape: Shape) -> Modality:
    return Label(shape, num_classes=CLASSES)


def _context_label(shape: Shape) -> Modality:
    return Label(shape, num_classes=5, observe_as="context")


def _coarse_label(shape: Shape) -> Modality:
    return Label(shape, num_classes=CLASSES, table_size=2)


def _text(raw: Any, folder: Path) -> str:
    return str(raw)


# -------------------------------------------------------------------------------------------------------- masks


def masks(cells: int, factor: int = 1) -> Values:
    """One class in every factor × factor pixels."""

    def draw(count: int, generator: Generator) -> Tensor:
        ids = torch.randint(CLASSES, (count, cells, cells), generator=generator)
        return ids.repeat_interleave(factor, 1).repeat_interleave(factor, 2)

    return draw


def mask_law(params: Tensor) -> Law:
    return Independent(Categorical(logits=params.movedim(1, -1)), 2)


def same_pixels(one: PILImage.Image, other: PILImage.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def _mask(size: int, **settings: Any) -> Callable[[Shape], Modality]:
    return lambda shape: Mask(shape, num_classes=CLASSES, size=size, **settings)


# --------------------------------------------------------------------------------------------------- embeddings


class EmbeddingLaw(NamedTuple):
    """Direction by SciPy, log ‖x‖ by torch, or constant."""

    directions: list[Any]
    log_norm: Normal | None

    def log_prob(self, value: Tensor) -> Tensor:
        norm = value.norm(dim=1)
        unit = (value / norm[:, None]).numpy()
        found = [float(law.logpdf(x)) for law, x in zip(self.directions, unit, strict=True)]
        direction = torch.tensor(found, dtype=torch.float64)
        return direction if self.log_norm is None else direction + self.log_norm.log_prob(norm.log())

    def entropy(self) -> Tensor:
        direction = torch.tensor([float(law.entropy()) for law in self.directions], dtype=torch.float64)
        return direction if self.log_norm is None else direction + self.log_norm.entropy()


def embedding_law(concentration: float | None = None, constant: bool = False) -> Callable[[Tensor], Law]:
    def law(params: Tensor) -> Law:
        params = params.detach().double()
        means = (params[:, :DIM] / params[:, :DIM].norm(dim=1, keepdim=True)).numpy()
        kappas = (DIM * softplus(params[:, DIM])).tolist() if concentration is None else [concentration] * len(params)
        log_norm = Normal(LOG_NORM + LOG_NORM_STD * params[:, DIM + 1], LOG_NORM_STD * params[:, DIM + 2].exp())
        directions = [vonmises_fisher(mean, kappa) for mean, kappa in zip(means, kappas, strict=True)]
        return EmbeddingLaw(directions, None if constant else log_norm)

    return law


def vectors(spread: float) -> Values:
    def draw(count: int, generator: Generator) -> Tensor:
        directions = torch.nn.functional.normalize(torch.randn(count, DIM, generator=generator), dim=1)
        return directions * (LOG_NORM + spread * torch.randn(count, 1, generator=generator)).exp()

    return draw


def vector_text(raw: list[float], folder: Path) -> str:
    return ",".join(map(str, raw))


def _embedding(spread: float, **settings: Any) -> Callable[[Shape], Modality]:
    given = {"dim": DIM, "log_norm_mean": LOG_NORM, "log_norm_std": spread, **settings}
    return lambda shape: Embedding(shape, **given)


# ------------------------------------------------------------------------------------------------------- tables

MEANS, STDS = [1.0, -2.0, 20.0], [0.5, 3.0, 10.0]


def tables(count: int, generator: Generator) -> Tensor:
    return torch.tensor(MEANS) + torch.tensor(STDS) * torch.randn(count, 3, generator=generator)


def _vector(dim: int = 3) -> Callable[[Shape], Modality]:
    return lambda shape: Vector(shape, dim=dim, mean=MEANS[:dim], std=STDS[:dim])


def vector_law(params: Tensor) -> Law:
    mean, log_std = params.chunk(2, dim=1)
    std = torch.tensor(STDS)[: mean.shape[1]]
    return Independent(Normal(torch.tensor(MEANS)[: mean.shape[1]] + std * mean, std * log_std.exp()), 1)


# --------------------------------------------------------------------------------------------------- dense maps


def maps(channels: int, cells: int, factor: int = 1) -> Values:
    def draw(count: int, generator: Generator) -> Tensor:
        numbers = DEPTH + DEPTH_STD * torch.randn(count, channels, cells, cells, generator=generator)
        return numbers.repeat_interleave(factor, 2).repeat_interleave(factor, 3)

    return draw


def dense_law(params: Tensor) -> Law:
    return Independent(Normal(DEPTH + DEPTH_STD * params[:, :-1], DEPTH_STD * params[:, -1:].exp()), 3)


def arrays(*shape: int) -> list[Any]:
    numbers = np.random.default_rng(0).normal(DEPTH, DEPTH_STD, size=(3, *shape)).astype(np.float32)
    return [array.tolist() for array in numbers]


def array_file(raw: Any, folder: Path) -> str:
    np.save(folder / "raw.npy", np.asarray(raw, dtype=np.float32))
    return str(folder / "raw.npy")


def same_numbers(one: Any, other: Any) -> bool:
    return np.array_equal(np.squeeze(one), np.squeeze(np.asarray(other, dtype=np.float32)))


def _dense(channels: int, size: int) -> Callable[[Shape], Modality]:
    return lambda shape: Dense(shape, channels=channels, size=size, mean=DEPTH, std=DEPTH_STD)


# --------------------------------------------------------------------------------------------------------- texts

TOKENS = 2  # of a text, so that all 1 + 256 + 256² texts can be counted


def texts(count: int, generator: Generator) -> Tensor:
    """Of no byte, one or two, a byte of each row its own."""
    value = torch.arange(2 * count).reshape(count, TOKENS) % 256
    length = torch.arange(count)[:, None] % 3
    return value.where(torch.arange(TOKENS) < length, 256)


@dataclass(frozen=True)
class TextLaw:
    """One token after the other, each by a categorical of torch."""

    params: Tensor

    def following(self, params: Tensor, begun: Tensor) -> Categorical:
        """Of the token after those that a text begins with, (B, n)."""
        modality = built_text().to(params.dtype)
        started = torch.cat([torch.full((len(begun), 1), 256), begun], dim=1)
        return Categorical(logits=modality.decoder(modality.table[started], params)[0][:, -1])

    def log_prob(self, value: Tensor) -> Tensor:
        first = self.following(self.params, value[:, :0]).log_prob(value[:, 0])
        second = self.following(self.params, value[:, :1]).log_prob(value[:, 1])
        return first + second * (value[:, 0] != 256)

    def entropy(self) -> Tensor:
        (params,) = self.params.split(1)
        first, begun = self.following(params, torch.empty(1, 0, dtype=torch.int64)), torch.arange(256)[:, None]
        second = self.following(params.expand(256, *params.shape[1:]), begun)
        return first.entropy() + (first.probs[0, :256] * second.entropy()).sum()


def built_text() -> Modality:
    torch.manual_seed(0)
    return _text_modality(Shape((2, 8, 8), FEATURES, POOLED))


def _text_modality(shape: Shape) -> Modality:
    return Text(shape, max_tokens=TOKENS, dim=16, depth=2, heads=2)


def text_file(raw: str, folder: Path) -> str:
    (folder / "raw.txt").write_text(raw, encoding="utf-8")
    return str(folder / "raw.txt")


# --------------------------------------------------------------------------------------------- sets of images


def image_sets(count: int, generator: Generator) -> Tensor:
    """Of one to three images."""
    there = torch.arange(3) < torch.randint(1, 4, (count, 1), generator=generator)  # (B, 3)
    there = there[:, :, None, None, None].float()
    pixels = torch.randint(LEVELS, (count, 3, 3, 16, 16), generator=generator) / 127.5 - 1.0
    return torch.cat([pixels * there, there.expand(-1, -1, 1, 16, 16)], dim=2)


def no_law(params: Tensor) -> Law:
    raise NotImplementedError


def sets_of_pictures() -> list[list[PILImage.Image]]:
    one, two, three = pictures(16, 16, 3)
    return [[one, two, three], [two], [three, one]]


def saved_set(raw: list[PILImage.Image], folder: Path) -> str:
    for index, image in enumerate(raw):
        image.save(folder / f"{index}.png")
    return ",".join(str(folder / f"{index}.png") for index in range(len(raw)))


def same_sets(one: list[PILImage.Image], other: list[PILImage.Image]) -> bool:
    return len(one) == len(other) and all(map(same_pixels, one, other))


def _image_set(**settings: Any) -> Callable[[Shape], Modality]:
    return lambda shape: ImageSet(shape, channels=3, size=16, max_images=3, dim=DIM, **settings)


# -------------------------------------------------------------------------------------------------------- cases

IDS, NAMES, PNG = datasets.Value("int64"), datasets.ClassLabel(names=list("abcde")), datasets.Image()
VECTOR = datasets.List(datasets.Value("float32"))
FINE, FLAT = datasets.Array2D((16, 16), "float32"), datasets.Array3D((3, 8, 8), "float32")
RAW_VECTORS = [np.float32(v).tolist() for v in vectors(LOG_NORM_STD)(3, Generator().manual_seed(9)).tolist()]
ALL_IDS, FINE_IDS, FEW_IDS = (pictures(n, n, below=CLASSES) for n in (8, 16, 4))
CASES = [
    Case("image", (1, 8, 8), _image(1), images(1), pictures(8, 8), PNG, image_law, saved),
    Case("colour", (3, 8, 8), _image(3), images(3), pictures(8, 8, 3), PNG, image_law, saved),
    Case("fine-image", (1, 8, 8), _image(3, 16), grey_blocks, pictures(16, 16, 3), PNG, image_law, saved, stride=2),
    Case("label", (2, 8, 8), _label, labels, [4, 0, 3], NAMES, label_law, _text),
    Case("coarse", (2, 8, 8), _coarse_label, labels, [4, 0, 3], NAMES, label_law, _text),
    Case("context", (2, 8, 8), _context_label, labels, [4, 0, 3], NAMES, label_law, _text),
    Case("integers", (2, 8, 8), _label, labels, [4, 0, 3], IDS, label_law, _text),
    Case("mask", (2, 8, 8), _mask(8), masks(8), ALL_IDS, PNG, mask_law, saved, same_pixels),
    Case("fine-mask", (2, 8, 8), _mask(16), masks(8, 2), FINE_IDS, PNG, mask_law, saved, same_pixels, stride=2),
    Case("coarse-mask", (2, 8, 8), _mask(4), masks(4), FEW_IDS, PNG, mask_law, saved, same_pixels),
    Case("patterns", (2, 8, 8), _mask(8, pattern_size=2), masks(8), ALL_IDS, PNG, mask_law, saved, same_pixels),
    Case("fixed", (3, 8, 8), _mask(8, patterns="fixed"), masks(8), ALL_IDS, PNG, mask_law, saved, same_pixels),
    Case(
        "masked-image", (3, 8, 8), _masked_image(8), masked(8), masked_pictures(8), PNG, hole_law, saved, same_pixels,
        asked=hidden_everywhere,
    ),
    Case(
        "masked-smooth", (3, 8, 8), _masked_image(8, "smooth"), masked(8), masked_pictures(8), PNG, hole_law, saved,
        same_pixels, asked=hidden_everywhere,
    ),
    Case(
        "masked-latent", (4, 8, 8), _masked_image(64), masked(64), masked_pictures(64), PNG, hole_law, saved,
        same_pixels, stride=2, asked=hidden_everywhere,
    ),
    Case(
        "embedding", (2, 8, 8), _embedding(LOG_NORM_STD), vectors(LOG_NORM_STD), RAW_VECTORS, VECTOR, embedding_law(),
        vector_text, same_numbers,
    ),
    Case(
        "constant-norm", (2, 8, 8), _embedding(0.0), vectors(0.0), RAW_VECTORS, VECTOR, embedding_law(constant=True),
        vector_text, same_numbers, redundant=2,
    ),
    Case(
        "cosine", (2, 8, 8), _embedding(LOG_NORM_STD, concentration=7.0), vectors(LOG_NORM_STD), RAW_VECTORS, VECTOR,
        embedding_law(concentration=7.0), vector_text, same_numbers, redundant=1,
    ),
    Case(
        "coarse-embedding", (2, 8, 8), _embedding(LOG_NORM_STD, map_size=2), vectors(LOG_NORM_STD), RAW_VECTORS, VECTOR,
        embedding_law(), vector_text, same_numbers,
    ),
    Case("vector", (2, 8, 8), _vector(), tables, [[1.0, -2.5, 30.0], [0.5, 0.0, 12.0], [1.5, 4.0, 7.0]],
         datasets.List(datasets.Value("float32")), vector_law, vector_text, same_numbers),
    Case("number", (1, 8, 8), _vector(1), lambda n, g: tables(n, g)[:, :1], [1.0, 0.5, 1.5],
         datasets.Value("float32"), vector_law, _text, same_numbers),
    Case("dense", (2, 8, 8), _dense(1, 16), maps(1, 8, 2), arrays(16, 16), FINE, dense_law, array_file, same_numbers),
    Case("normals", (1, 8, 8), _dense(3, 8), maps(3, 8), arrays(3, 8, 8), FLAT, dense_law, array_file, same_numbers),
    Case("latent-normals", (4, 8, 8), _dense(3, 8), maps(3, 8), arrays(3, 8, 8), FLAT, dense_law, array_file,
         same_numbers),
    Case("text", (2, 8, 8), _text_modality, texts, ["", "é", "ab"], datasets.Value("string"), TextLaw, text_file,
         redundant=193),
    Case("image-set", (3, 8, 8), _image_set(), image_sets, sets_of_pictures(), datasets.List(PNG), no_law, saved_set,
         same_sets),
    Case("image-set-map", (2, 8, 8), _image_set(observe_as="channels", map_size=4, fusion="max"), image_sets,
         sets_of_pictures(), datasets.List(PNG), no_law, saved_set, same_sets),
]  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def build(case: Case, seed: int = 0) -> Modality:
    torch.manual_seed(seed)
    return case.build(case.shape)


def decoded(modality: Modality, count: int = 6) -> Tensor:
    generator = seeded(1)
    grid = [side // modality.shape.stride for side in modality.shape.space[1:]]
    features = 2 * torch.randn(count, FEATURES, *grid, generator=generator)
    return modality.decode(features, 2 * torch.randn(count, POOLED, generator=generator))


def draws(modality: Modality, params: Tensor, count: int) -> Tensor:
    """``count`` draws of the law of one row of params."""
    noise = torch.randn(count, *modality.noise_shape, generator=seeded(2))
    return modality.sample(params.expand(count, *params.shape[1:]), noise)


#: A modality that only conditions has no head; its gradients and its state dict are laws of `check_modality`.
every_head = pytest.mark.parametrize(
    "case", [case for case in CASES if isinstance(build(case), Modality)], ids=lambda case: case.name
)


def test_every_kind_is_tested() -> None:
    assert {type(build(case)) for case in CASES} == set(MODALITIES.values())


@every_case
def test_the_check_for_users_finds_nothing_wrong(case: Case) -> None:
    findings = check_modality(case.build, case.shape)
    assert [finding.law for finding in findings] == list(LAWS)
    assert [finding for finding in findings if finding.fault] == []


# --------------------------------------------------------------------------------------------- value -> diffusion


@pytest.mark.parametrize("case", [case for case in CASES if build(case).aggregable], ids=lambda case: case.name)
def test_encodings_have_mean_square_one(case: Case) -> None:
    modality, values = build(case), case.values(2000, seeded())
    encoding = modality.encode(values)
    assert encoding.shape == (2000, *case.space)
    assert encoding.isfinite().all()
    squares = encoding.detach().double().square().mean(dim=(1, 2, 3))  # (B,), independent
    error = 4 * float(squares.std()) / math.sqrt(len(squares))
    assert float(squares.mean()) == pytest.approx(1.0, abs=error + 1e-5)  # 1e-5: float32


@every_case
def test_observation_has_its_declared_channels(case: Case) -> None:
    modality, values = build(case), case.values(3, seeded())
    observation = modality.observe(values)
    assert observation.shape == (3, modality.observation_channels, *case.space[1:])
    assert modality.context(values).shape == (3, modality.context_width)
    assert observation.isfinite().all()


@every_case
def test_encoding_and_observation_are_per_sample(case: Case) -> None:
    modality, values = build(case), case.values(6, seeded())
    for map_ in (modality.encode, modality.observe):
        parts = torch.cat([map_(part) for part in values.split(4)])
        torch.testing.assert_close(parts, map_(values), rtol=1e-5, atol=1e-6)  # products of matrices round by size


@every_head
def test_gradients_reach_every_parameter(case: Case) -> None:
    modality, values = build(case), case.values(64, seeded())  # 64 rows meet all 5 classes
    shown = modality.encode(values), modality.observe(values)
    loss = sum((torch.randn(x.shape, generator=seeded(3)) * x).sum() for x in shown)
    (loss + modality.nll(decoded(modality, 64), values).sum()).backward()
    for name, parameter in modality.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            reached = parameter.grad.reshape(len(parameter), -1).any(dim=1)  # of every class, of every output
            assert int((~reached).sum()) in (0, case.redundant), name


# --------------------------------------------------------------------------------------------- diffusion -> value


@every_head
def test_nll_is_that_of_the_law_per_dimension(case: Case) -> None:
    modality, values = build(case).double(), case.values(6, seeded())
    values = values.double() if values.is_floating_point() else values
    params = decoded(modality.float()).double()
    nll = modality.nll(params, values)
    assert nll.shape == (6,)
    torch.testing.assert_close(nll * modality.dimensions, -case.law(params).log_prob(values), rtol=1e-10, atol=1e-10)


@every_head
def test_nll_is_per_sample(case: Case) -> None:
    modality, values = build(case), case.values(6, seeded())
    params = decoded(modality)
    whole = modality.nll(params, values)
    parts = [modality.nll(p, v) for p, v in zip(params.split(4), values.split(4), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(modality.nll(params.flip(0), values.flip(0)).flip(0), whole, rtol=1e-6, atol=1e-6)


@every_head
def test_sample_is_a_function_of_params_and_noise_per_sample(case: Case) -> None:
    modality = build(case)
    params, noise = decoded(modality), torch.randn(6, *modality.noise_shape, generator=seeded(2))
    whole = modality.sample(params, noise)
    modality.check(whole)
    parts = [modality.sample(p, n) for p, n in zip(params.split(4), noise.split(4), strict=True)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(modality.sample(params, -noise), whole)


@every_head
def test_samples_follow_the_law(case: Case) -> None:
    """E[nll] over draws is the law's entropy."""
    modality = build(case)
    params = decoded(modality, 1).detach()
    asked = case.asked(draws(modality, params, 4000))
    nll = modality.nll(params.expand(4000, *params.shape[1:]), asked).double()
    error = 4 * float(nll.std()) / math.sqrt(len(nll))
    assert float(nll.mean()) == pytest.approx(float(case.law(params).entropy()) / modality.dimensions, abs=error)


@every_head
def test_nothing_is_likelier_than_the_mode(case: Case) -> None:
    modality = build(case)
    for params in decoded(modality).split(1):
        mode = modality.mode(params)
        modality.check(mode)
        rows, drawn = params.expand(500, *params.shape[1:]), case.asked(draws(modality, params, 500))
        assert (modality.nll(rows, drawn) >= modality.nll(params, case.asked(mode)) - 1e-6).all()


@pytest.mark.parametrize("case", [c for c in CASES if build(c).aggregable], ids=lambda case: case.name)
def test_expected_encoding_is_the_mean_over_draws(case: Case) -> None:
    modality, count = build(case), 4000
    with torch.no_grad():
        for params in decoded(modality, 2).split(1):
            encodings = modality.encode(draws(modality, params, count)).double()
            expected = modality.expected_encoding(params)
            assert expected.shape == (1, *case.space)
            error = encodings.std(dim=0) / math.sqrt(count)
            # 5 standard errors: about 200 numbers are compared, each off with probability 6e-7
            assert ((encodings.mean(dim=0) - expected[0]).abs() <= 5 * error + 1e-5).all()


# ------------------------------------------------------------------------------------------------- data <-> value


@every_case
def test_preprocess_gives_valid_values(case: Case) -> None:
    modality = build(case)
    for raw in case.raws:
        value = modality.preprocess(raw)
        assert value.shape == modality.value_shape == modality.placeholder().shape
        assert value.dtype == modality.placeholder().dtype
        modality.check(value[None])


@every_case
def test_postprocess_undoes_preprocess(case: Case) -> None:
    modality = build(case)
    back = modality.postprocess(torch.stack([modality.preprocess(raw) for raw in case.raws]))
    assert len(back) == len(case.raws)
    assert all(case.same(one, other) for one, other in zip(back, case.raws, strict=True))


@every_case
def test_parse_reads_what_a_person_types(case: Case, tmp_path: Path) -> None:
    modality = build(case)
    for raw in case.raws:
        parsed = modality.parse(case.text(raw, tmp_path))
        assert torch.equal(modality.preprocess(parsed), modality.preprocess(raw))
    with pytest.raises(InputError, match="no such thing"):
        modality.parse("no such thing.txt" if isinstance(modality, Text) else "no such thing")  # any text is a text


@every_case
def test_settings_from_data_fit_the_data(case: Case) -> None:
    features = datasets.Features({"column": case.feature})
    rows = datasets.Dataset.from_dict({"column": [None, *case.raws]}, features=features)
    kind = type(build(case))
    channels, *size = (build(case).value_shape + (0, 0, 0))[:3]
    settings = kind.settings_from_anchor(channels=channels - 1, size=size)  # a masked image has a channel for its hole
    settings |= kind.settings_from_data(rows.features["column"], (row["column"] for row in rows), **settings)
    modality = kind(case.shape, **settings)
    assert modality.value_shape == build(case).value_shape
    for row, raw in zip(rows.select(range(1, len(rows))), case.raws, strict=True):
        assert torch.equal(modality.preprocess(row["column"]), build(case).preprocess(raw))


@every_case
def test_placeholder_and_gallery_are_valid(case: Case) -> None:
    modality = build(case)
    gallery = modality.gallery()
    for values in [modality.placeholder()[None]] + ([] if gallery is None else [gallery]):
        modality.check(values)
        assert modality.encode(values).isfinite().all()


@every_case
def test_check_refuses_other_shapes_and_types(case: Case) -> None:
    modality, values = build(case), case.values(3, seeded())
    modality.check(values)
    other_type = values.long() if values.is_floating_point() else values.float()
    for wrong in (values[..., None], values[0], other_type, values > 0):
        with pytest.raises(InputError, match="value = "):
            modality.check(wrong)


@every_head
def test_state_dict_carries_everything(case: Case) -> None:
    one, other, values = build(case, seed=0), build(case, seed=1), case.values(6, seeded())
    assert not torch.equal(decoded(one), decoded(other))
    other.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(decoded(one), decoded(other))
    assert torch.equal(one.encode(values), other.encode(values))
