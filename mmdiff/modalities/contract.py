"""The contract of a modality as checks that say in words what fails: `mmdiff check-modality`, and the tests."""

from __future__ import annotations

import copy
import math
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from mmdiff.modalities.base import Condition, Modality, Shape

Build = Callable[[Shape], Condition]
_ROWS = 64


class Finding(NamedTuple):
    """One law: its name, and what is wrong in words, or None."""

    law: str
    fault: str | None


class Fault(Exception):
    """A law is broken; the message says how."""


def check_modality(build: Build, shape: Shape) -> list[Finding]:
    """Run every law on a modality.

    Args:
        build: shape -> modality, with weights from the global random state.
        shape: surroundings to build it in.

    Returns:
        One finding per law, in order. Where it cannot be built there is one.
    """
    with torch.random.fork_rng(devices=[]):
        return list(_findings(build, shape))


def _findings(build: Build, shape: Shape) -> Iterator[Finding]:
    for name, law in LAWS.items():
        torch.manual_seed(0)
        try:
            if name not in _OF_HEADS or isinstance(build(shape), Modality):
                torch.manual_seed(0)
                law(build, shape)
        except Fault as fault:
            yield Finding(name, str(fault))
        except Exception as error:  # whatever a person's own code raises is a finding
            place = traceback.extract_tb(error.__traceback__)[-1]
            line = f"{place.filename.rsplit('/', 1)[-1]}:{place.lineno}, in {place.name}"
            yield Finding(name, f"raises {type(error).__name__}: {error} ({line})")
        else:
            yield Finding(name, None)


def _values(modality: Condition, count: int = _ROWS, seed: int = 1) -> Tensor:
    return modality.examples(count, Generator().manual_seed(seed))


def _params(modality: Modality, shape: Shape, count: int = _ROWS) -> Tensor:
    generator = Generator().manual_seed(2)
    _, height, width = shape.space
    grid = (height // shape.stride, width // shape.stride)
    features = torch.randn(count, shape.features, *grid, generator=generator)
    return modality.decode(features, torch.randn(count, shape.pooled, generator=generator))


def _noise(modality: Modality, count: int = _ROWS, seed: int = 3) -> Tensor:
    return torch.randn(count, *modality.noise_shape, generator=Generator().manual_seed(seed))


def _expect(condition: bool, fault: str) -> None:
    if not condition:
        raise Fault(fault)


def _expect_shape(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    _expect(isinstance(tensor, Tensor), f"{name} gives {type(tensor).__name__}, expected a tensor of shape {wanted}")
    _expect(tuple(tensor.shape) == wanted, f"{name} gives shape {tuple(tensor.shape)}, expected {wanted}")
    _expect(not tensor.is_floating_point() or bool(tensor.isfinite().all()), f"{name} gives NaN or infinity")


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-5)


def values(build: Build, shape: Shape) -> None:
    """Examples and the placeholder are values."""
    modality = build(shape)
    examples, placeholder = _values(modality), modality.placeholder()
    _expect_shape("examples(64, …)", examples, (_ROWS, *modality.value_shape))
    _expect_shape("placeholder()", placeholder, modality.value_shape)
    _expect(examples.dtype == placeholder.dtype, f"examples are {examples.dtype}, the placeholder {placeholder.dtype}")
    modality.check(examples)


def encoding(build: Build, shape: Shape) -> None:
    """E maps into the diffusion space, every sample by itself."""
    modality = build(shape)
    examples = _values(modality)
    encoded = modality.encode(examples)
    _expect_shape("encode(value)", encoded, (_ROWS, *shape.space))
    _expect(_same(modality.encode(examples[:5]), encoded[:5]), "encode depends on the other rows of the batch")
    _expect_shape("encode(placeholder)", modality.encode(modality.placeholder()[None]), (1, *shape.space))


def unit_variance(build: Build, shape: Shape) -> None:
    """Encodings have mean square 1, so that a weight's scale means the same for every modality."""
    modality = build(shape)
    if modality.aggregable:
        square = float(modality.encode(_values(modality, 512)).detach().square().mean())
        _expect(0.8 < square < 1.25, f"the mean square of encode(examples) is {square:.3g}, expected 1")


def observation(build: Build, shape: Shape) -> None:
    """`observe` and `context` give the channels and numbers that were announced."""
    modality = build(shape)
    wanted = (_ROWS, modality.observation_channels, *shape.space[1:])
    _expect_shape("observe(value)", modality.observe(_values(modality)), wanted)
    _expect_shape("context(value)", modality.context(_values(modality)), (_ROWS, modality.context_width))


def likelihood(build: Build, shape: Shape) -> None:
    """`nll` is one finite number per sample, of that sample alone."""
    modality = build(shape)
    params, examples = _params(modality, shape), _values(modality)
    _expect(len(params) == _ROWS, f"decode gives {len(params)} rows for {_ROWS}, expected the batch first")
    nll = modality.nll(params, examples)
    _expect_shape("nll(params, value)", nll, (_ROWS,))
    _expect(_same(modality.nll(params[:5], examples[:5]), nll[:5]), "nll depends on the other rows of the batch")
    _expect(modality.dimensions >= 1, f"dimensions is {modality.dimensions}, expected a positive number")


def sampling(build: Build, shape: Shape) -> None:
    """`sample` is a function of params and noise per sample, and gives valid values."""
    modality = build(shape)
    params, noise = _params(modality, shape), _noise(modality)
    drawn = modality.sample(params, noise)
    modality.check(drawn)
    _expect(torch.equal(modality.sample(params, noise), drawn), "sample differs between two calls: use only the noise")
    _expect(_same(modality.sample(params[:5], noise[:5]), drawn[:5]), "sample depends on the other rows of the batch")
    _expect(not torch.equal(modality.sample(params, -noise), drawn), "sample does not depend on the noise")


def mode(build: Build, shape: Shape) -> None:
    """Nothing is likelier than the mode."""
    modality = build(shape)
    params = _params(modality, shape)
    best = modality.mode(params)
    modality.check(best)
    worse = (modality.nll(params, modality.sample(params, _noise(modality))) - modality.nll(params, best)).detach()
    _expect(bool((worse > -1e-4).all()), f"a draw is likelier than the mode, by {-float(worse.min()):.3g} nats")


def expected_encoding(build: Build, shape: Shape, draws: int = 2000) -> None:
    """`expected_encoding` is the mean encoding of draws."""
    modality = build(shape)
    with torch.no_grad():
        params = _params(modality, shape, 1)
        expected = modality.expected_encoding(params)
        _expect_shape("expected_encoding(params)", expected, (1, *shape.space))
        if modality.aggregable:
            rows = params.expand(draws, *params.shape[1:])
            encoded = modality.encode(modality.sample(rows, _noise(modality, draws)))
            gap = float((encoded.mean(0) - expected[0]).square().mean().sqrt())
            allowed = 0.02 + 3 * float(encoded.std(0).square().mean().sqrt()) / math.sqrt(draws)
            _expect(gap < allowed, f"expected_encoding is {gap:.3g} (RMS) from the mean over {draws} draws")


def average(build: Build, shape: Shape) -> None:
    """The average of one distribution with itself is that distribution."""
    modality = build(shape)
    params, examples = _params(modality, shape), _values(modality)
    averaged = modality.average([params, params])
    _expect_shape("average([params, params])", averaged, tuple(params.shape))
    same = _same(modality.nll(averaged, examples), modality.nll(params, examples))
    _expect(same, "average([params, params]) has another nll than params")


def gradients(build: Build, shape: Shape) -> None:
    """Every parameter that is trained is reached by a gradient."""
    modality = build(shape)
    examples = _values(modality)
    shown = modality.encode(examples), modality.observe(examples), modality.context(examples)
    loss = sum((x * torch.randn(x.shape, generator=Generator().manual_seed(4))).sum() for x in shown)
    if isinstance(modality, Modality):
        loss = loss + modality.nll(_params(modality, shape), examples).sum()
    loss.backward()
    for name, parameter in modality.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any())
        _expect(reached or not parameter.requires_grad, f"no finite gradient reaches the parameter {name}")


def round_trip(build: Build, shape: Shape) -> None:
    """What `postprocess` gives a person, `preprocess` reads back."""
    modality = build(shape)
    examples = _values(modality, 4)
    shown = modality.postprocess(examples)
    _expect(len(shown) == 4, f"postprocess gives {len(shown)} things for 4 values")
    back = torch.stack([modality.preprocess(one) for one in shown])
    worst = float((back.double() - examples.double()).abs().max())
    _expect(worst < 0.02, f"preprocess(postprocess(value)) differs from the value by up to {worst:.3g}")


def files(build: Build, shape: Shape) -> None:
    """What `save` writes of `postprocess`, `parse` reads back."""
    modality = build(shape)
    shown = modality.postprocess(_values(modality, 2))
    with tempfile.TemporaryDirectory() as folder:
        paths = [modality.save(one, Path(folder) / str(index)) for index, one in enumerate(shown)]
        _expect(len(set(paths)) == 2 and all(path.is_file() for path in paths), f"save gives {paths}, not its file")
        back = torch.stack([modality.preprocess(modality.parse(str(path))) for path in paths])
    wanted = torch.stack([modality.preprocess(one) for one in shown])
    _expect(torch.equal(back, wanted), "parse reads another value than save has written")


def slots(build: Build, shape: Shape) -> None:
    """`slots` names what each entry belongs to, every one apart: fine-tuning goes by it."""
    modality = build(shape)
    given, state = modality.slots(by_name=modality.names is not None), modality.state_dict()
    counts = [("observation_channels", given.channels, modality.observation_channels)]
    counts += [("context_width", given.context, modality.context_width)]
    for name, axes in given.state.items():
        _expect(name in state, f"slots names {name}, which the state does not hold")
        counts += [(f"{name}, dimension {dim},", axis.slots, state[name].shape[dim]) for dim, axis in axes.items()]
    for name, found, wanted in counts:
        different = len({slot.key for slot in found})
        _expect(different == len(found) == wanted, f"{name} has {wanted} entries, slots {different} different ones")


def save_and_load(build: Build, shape: Shape) -> None:
    """The state dict carries everything that was drawn at random or learned."""
    torch.manual_seed(5)
    one = build(shape)
    torch.manual_seed(6)
    other = build(shape)
    other.load_state_dict(one.state_dict(), strict=True)
    examples = _values(one)
    maps: dict[str, Callable[[Condition], Tensor]] = {
        "encode": lambda modality: modality.encode(examples),
        "observe": lambda modality: modality.observe(examples),
        "context": lambda modality: modality.context(examples),
    }
    if isinstance(one, Modality):
        maps["decode"] = lambda modality: _params(modality, shape)
    for name, map_ in maps.items():
        same = torch.equal(map_(one), map_(other))
        _expect(same, f"{name} differs after loading the state dict into a fresh instance")


def half_precision(build: Build, shape: Shape) -> None:
    """With weights in bfloat16 only `decode` computes in it; everything else takes and gives float32."""
    torch.manual_seed(5)
    modality = build(shape)
    examples = _values(modality)
    encoded = modality.encode(examples)
    modality = modality.to(torch.bfloat16)
    rounded = modality.encode(examples)
    _expect(rounded.dtype == torch.float32, f"encode gives {rounded.dtype}, expected torch.float32")
    error = float((rounded - encoded).detach().square().mean().sqrt())
    _expect(error < 0.05, f"with weights in bfloat16 encode is off by {error:.3g} (RMS)")
    modality.observe(examples), modality.context(examples)
    if not isinstance(modality, Modality):
        return
    _, height, width = shape.space
    features = torch.randn(_ROWS, shape.features, height // shape.stride, width // shape.stride)
    params = modality.decode(features.bfloat16(), torch.randn(_ROWS, shape.pooled).bfloat16()).float()
    modality.check(modality.sample(params, _noise(modality)))
    modality.check(modality.mode(params))
    _expect_shape("expected_encoding(params)", modality.expected_encoding(params), (_ROWS, *shape.space))
    _expect_shape("nll(params, value)", modality.nll(params, examples), (_ROWS,))


def safetensors_file(build: Build, shape: Shape) -> None:
    """Safetensors, the format of pipelines, can hold its state: no two of its tensors share memory."""
    modality = build(shape)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        try:
            save_file({name: tensor.contiguous() for name, tensor in modality.state_dict().items()}, path)
        except RuntimeError as error:
            names = ", ".join(sorted(str(error).partition("{")[2].partition("}")[0].split(", ")))
            raise Fault(f"{{{names}}} share memory and are no tied modules; keep one out of the state") from None
        back = load_file(path)
    same = all(torch.equal(back[name], tensor) for name, tensor in modality.state_dict().items())
    _expect(same, "the state differs after a trip through safetensors")


def copies(build: Build, shape: Shape) -> None:
    """It can be pickled, for data workers, and deep-copied, for averages."""
    modality = build(shape)
    examples = _values(modality, 4)
    pickled = ForkingPickler.loads(ForkingPickler.dumps(modality))
    for name, copied in (("pickle", pickled), ("deepcopy", copy.deepcopy(modality))):
        _expect(torch.equal(copied.encode(examples), modality.encode(examples)), f"encode differs after {name}")
        _expect(torch.equal(copied.placeholder(), modality.placeholder()), f"placeholder differs after {name}")


LAWS: dict[str, Callable[[Build, Shape], None]] = {
    "values": values,
    "encoding": encoding,
    "unit variance": unit_variance,
    "observation": observation,
    "likelihood": likelihood,
    "sampling": sampling,
    "mode": mode,
    "expected encoding": expected_encoding,
    "average": average,
    "gradients": gradients,
    "round trip": round_trip,
    "files": files,
    "slots": slots,
    "save and load": save_and_load,
    "safetensors": safetensors_file,
    "copies": copies,
    "half precision": half_precision,
}
_OF_HEADS = {"likelihood", "sampling", "mode", "expected encoding", "average"}
