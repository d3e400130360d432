"""The contract of a modality as checks that say in words what fails: `mmdiff check-modality`, and the tests."""

from __future__ import annotations

import copy
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from mmdiff.augmentation import Change
from mmdiff.errors import InputError
from mmdiff.modalities.base import Condition, Modality, Shape
from mmdiff.modalities.expectations import ROWS, Fault, equal, examples_of, expect, expect_shape, noise_of, params_of
from mmdiff.modalities.head_contract import HEAD_LAWS
from mmdiff.modalities.query import Asked

FLIP = Change(flip=True)
Build = Callable[[Shape], Condition]


class Finding(NamedTuple):
    """One law: its name, and what is wrong in words, or None."""

    law: str
    fault: str | None


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
            if name not in HEAD_LAWS or isinstance(build(shape), Modality):
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


def values(build: Build, shape: Shape) -> None:
    """Examples and the placeholder are values."""
    modality = build(shape)
    examples, placeholder = examples_of(modality), modality.placeholder()
    expect_shape("examples(64, …)", examples, (ROWS, *modality.value_shape))
    expect_shape("placeholder()", placeholder, modality.value_shape)
    expect(examples.dtype == placeholder.dtype, f"examples are {examples.dtype}, the placeholder {placeholder.dtype}")
    modality.check(examples)


def encoding(build: Build, shape: Shape) -> None:
    """E maps into the diffusion space, every sample by itself."""
    modality = build(shape)
    examples = examples_of(modality)
    encoded = modality.encode(examples)
    expect_shape("encode(value)", encoded, (ROWS, *shape.space))
    expect(equal(modality.encode(examples[:5]), encoded[:5]), "encode depends on the other rows of the batch")
    expect_shape("encode(placeholder)", modality.encode(modality.placeholder()[None]), (1, *shape.space))


def unit_variance(build: Build, shape: Shape) -> None:
    """Encodings have mean square 1, so that a weight's scale means the same for every modality."""
    modality = build(shape)
    if modality.aggregable:
        square = float(modality.encode(examples_of(modality, 512)).detach().square().mean())
        expect(0.8 < square < 1.25, f"the mean square of encode(examples) is {square:.3g}, expected 1")


def observation(build: Build, shape: Shape) -> None:
    """`observe` and `context` give the channels and numbers that were announced."""
    modality = build(shape)
    wanted = (ROWS, modality.observation_channels, *shape.space[1:])
    expect_shape("observe(value)", modality.observe(examples_of(modality)), wanted)
    expect_shape("context(value)", modality.context(examples_of(modality)), (ROWS, modality.context_width))


def following(build: Build, shape: Shape) -> None:
    """A value follows a change of its row to another value of its kind; two flips undo each other."""
    modality = build(shape)
    for value in examples_of(modality, 4):
        try:
            flipped, cropped = (modality.follow(value, change) for change in (FLIP, Change(box=(0.25, 0.0, 0.5, 0.5))))
        except InputError:  # it says that it cannot; `data.augment` refuses it
            return
        expect_shape("follow(value, a crop)", cropped, modality.value_shape)
        modality.check(torch.stack([flipped, cropped]))
        expect(equal(modality.follow(flipped, FLIP), value), "follow gives another value after two flips")
        expect(equal(modality.follow(value, Change()), value), "follow changes a value that nothing happens to")


def gradients(build: Build, shape: Shape) -> None:
    """Every parameter that is trained is reached by a gradient."""
    modality = build(shape)
    examples = examples_of(modality)
    if isinstance(modality, Asked) and modality.query is not None:  # where nothing is asked, its weights rest
        modality = modality.asked(torch.randn(ROWS, modality.query_dim, generator=Generator().manual_seed(5)))
    inputs = modality.encode(examples), modality.observe(examples), modality.context(examples)
    loss = sum((x * torch.randn(x.shape, generator=Generator().manual_seed(4))).sum() for x in inputs)
    if isinstance(modality, Modality):
        loss = loss + modality.nll(params_of(modality, shape), examples).sum()
    if loss.requires_grad:
        loss.backward()
    for name, parameter in modality.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any())
        expect(reached or not parameter.requires_grad, f"no finite gradient reaches the parameter {name}")


def round_trip(build: Build, shape: Shape) -> None:
    """What `postprocess` gives a person, `preprocess` reads back."""
    modality = build(shape)
    examples = examples_of(modality, 4)
    outputs = modality.postprocess(examples)
    expect(len(outputs) == 4, f"postprocess gives {len(outputs)} things for 4 values")
    back = torch.stack([modality.preprocess(one) for one in outputs])
    worst = float((back.double() - examples.double()).abs().max())
    expect(worst < 0.02, f"preprocess(postprocess(value)) differs from the value by up to {worst:.3g}")


def files(build: Build, shape: Shape) -> None:
    """What `save` writes of `postprocess`, `parse` reads back."""
    modality = build(shape)
    outputs = modality.postprocess(examples_of(modality, 2))
    with tempfile.TemporaryDirectory() as folder:
        paths = [modality.save(one, Path(folder) / str(index)) for index, one in enumerate(outputs)]
        expect(len(set(paths)) == 2 and all(path.is_file() for path in paths), f"save gives {paths}, not its file")
        back = torch.stack([modality.preprocess(modality.parse(str(path))) for path in paths])
    wanted = torch.stack([modality.preprocess(one) for one in outputs])
    expect(torch.equal(back, wanted), "parse reads another value than save has written")


def slots(build: Build, shape: Shape) -> None:
    """`slots` names what each entry belongs to, every one apart: fine-tuning goes by it."""
    modality = build(shape)
    entries, state = modality.slots(by_name=modality.names is not None), modality.state_dict()
    counts = [("observation_channels", entries.channels, modality.observation_channels)]
    counts += [("context_width", entries.context, modality.context_width)]
    for name, axes in entries.state.items():
        expect(name in state, f"slots names {name}, which the state does not hold")
        counts += [(f"{name}, dimension {dim},", axis.slots, state[name].shape[dim]) for dim, axis in axes.items()]
    for name, owners, wanted in counts:
        different = len({slot.key for slot in owners})
        expect(different == len(owners) == wanted, f"{name} has {wanted} entries, slots {different} different ones")


def save_and_load(build: Build, shape: Shape) -> None:
    """The state dict carries everything that was drawn at random or learned."""
    torch.manual_seed(5)
    one = build(shape)
    torch.manual_seed(6)
    other = build(shape)
    other.load_state_dict(one.state_dict(), strict=True)
    examples = examples_of(one)
    maps: dict[str, Callable[[Condition], Tensor]] = {
        "encode": lambda modality: modality.encode(examples),
        "observe": lambda modality: modality.observe(examples),
        "context": lambda modality: modality.context(examples),
    }
    if isinstance(one, Modality):
        maps["decode"] = lambda modality: params_of(modality, shape)
    for name, map_ in maps.items():
        same = torch.equal(map_(one), map_(other))
        expect(same, f"{name} differs after loading the state dict into a fresh instance")


def half_precision(build: Build, shape: Shape) -> None:
    """With weights in bfloat16 only `decode` computes in it; everything else takes and gives float32."""
    torch.manual_seed(5)
    modality = build(shape)
    examples = examples_of(modality)
    encoded = modality.encode(examples)
    modality = modality.to(torch.bfloat16)
    rounded = modality.encode(examples)
    expect(rounded.dtype == torch.float32, f"encode gives {rounded.dtype}, expected torch.float32")
    error = float((rounded - encoded).detach().square().mean().sqrt())
    expect(error < 0.05, f"with weights in bfloat16 encode is off by {error:.3g} (RMS)")
    modality.observe(examples), modality.context(examples)
    if not isinstance(modality, Modality):
        return
    _, height, width = shape.space
    features = torch.randn(ROWS, shape.features, height // shape.stride, width // shape.stride)
    params = modality.decode(features.bfloat16(), torch.randn(ROWS, shape.pooled).bfloat16()).float()
    modality.check(modality.sample(params, noise_of(modality)))
    modality.check(modality.mode(params))
    expect_shape("expected_encoding(params)", modality.expected_encoding(params), (ROWS, *shape.space))
    expect_shape("nll(params, value)", modality.nll(params, examples), (ROWS,))


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
    expect(same, "the state differs after a trip through safetensors")


def copies(build: Build, shape: Shape) -> None:
    """It can be pickled, for data workers, and deep-copied, for averages."""
    modality = build(shape)
    examples = examples_of(modality, 4)
    pickled = ForkingPickler.loads(ForkingPickler.dumps(modality))
    for name, copied in (("pickle", pickled), ("deepcopy", copy.deepcopy(modality))):
        expect(torch.equal(copied.encode(examples), modality.encode(examples)), f"encode differs after {name}")
        expect(torch.equal(copied.placeholder(), modality.placeholder()), f"placeholder differs after {name}")


LAWS: dict[str, Callable[[Build, Shape], None]] = {
    "values": values,
    "encoding": encoding,
    "unit variance": unit_variance,
    "observation": observation,
    "following": following,
    **HEAD_LAWS,
    "gradients": gradients,
    "round trip": round_trip,
    "files": files,
    "slots": slots,
    "save and load": save_and_load,
    "safetensors": safetensors_file,
    "copies": copies,
    "half precision": half_precision,
}
