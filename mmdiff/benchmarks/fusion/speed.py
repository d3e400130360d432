"""`mmdiff benchmark fusion-speed`: a ragged batch of sets fused at once against a loop over the sets."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmdiff.benchmarks.interleaved import interleaved
from mmdiff.benchmarks.machine import machine
from mmdiff.errors import InputError
from mmdiff.evaluation.tables import facts
from mmdiff.modalities.fusion import FUSIONS, Fused, Fusion, build_fusion


class FusionSpeed(NamedTuple):
    """Milliseconds of CPU time (on a GPU: of wall time) for all sets: in one ``batch``, in a ``loop`` that calls the
    same module for one set after another, and in a loop over the ``bare`` equation written for one set; and the largest
    ``difference`` between a result of the batch and that of a loop."""

    batch: float
    loop: float
    bare: float
    difference: float


def fusion_speed(
    kind: str, sets: int, largest: int, dim: int, rounds: int, backward: bool, device: str = "cpu"
) -> FusionSpeed:
    """Time one fusion, the three sides in turn in every round; medians over the rounds.

    Args:
        kind: a key of `FUSIONS`.
        sets: B; their sizes run evenly from 1 to ``largest``.
        dim: d.
        rounds: at least 1; one more warms up.
        backward: with the gradients of members and weights.
        device: cpu or cuda.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build_fusion(kind, dim).to(device)
    counts = [1 + (index * largest) // sets for index in range(sets)]
    mask = (torch.arange(largest) < torch.tensor(counts)[:, None]).to(device)
    members = torch.randn(sets, largest, dim, generator=generator).to(device).requires_grad_(backward)
    fusions: dict[str, Callable[[], list[Fused]]] = {
        "batch": lambda: [module(members, mask)],
        "loop": lambda: [module(members[k : k + 1, :n], mask[k : k + 1, :n]) for k, n in enumerate(counts)],
        "bare": lambda: [_BARE[kind](module, members[k, :n]) for k, n in enumerate(counts)],
    }
    outputs: dict[str, Tensor] = {}

    def fuse(name: str) -> None:
        members.grad = None
        outputs[name] = torch.cat([one.embedding.reshape(-1, dim) for one in fusions[name]()])  # (B, d)
        if backward:
            outputs[name].square().sum().backward()

    with torch.set_grad_enabled(backward):
        times = interleaved({name: functools.partial(fuse, name) for name in fusions}, rounds, device)
    difference = max(float((outputs["batch"] - outputs[name]).detach().abs().max()) for name in ("loop", "bare"))
    medians = {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
    return FusionSpeed(**medians, difference=difference)


def compare_fusions(
    sets: int = 64, largest: int = 20, dim: int = 512, rounds: int = 20, threads: int = 1, device: str = "cpu"
) -> str:
    """The table of all fusions, forward and with gradients; see `fusion_speed`."""
    for key, value in (("sets", sets), ("largest", largest), ("dim", dim), ("rounds", rounds), ("threads", threads)):
        if value < 1:
            raise InputError(f"--{key}", value, "needs at least 1")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise InputError("--device", device, "is not here; choose cpu, or cuda where torch finds one")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        lines = [
            *facts(machine(device)),
            f"{sets} sets of 1 … {largest} members of {dim} numbers, float32, median of {rounds} rounds",
            f"{'':<34}{'batch':>9}{'loop':>11}{'ratio':>8}{'bare loop':>11}{'ratio':>8}{'difference':>13}",
        ]
        for kind in FUSIONS:
            for name, backward in ((kind, False), (f"{kind}, gradients", True)):
                times = fusion_speed(kind, sets, largest, dim, rounds, backward, device)
                lines.append(
                    f"{name:<34}{times.batch:>6.2f} ms{times.loop:>8.2f} ms{times.loop / times.batch:>7.1f}×"
                    f"{times.bare:>8.2f} ms{times.bare / times.batch:>7.1f}×{times.difference:>13.1e}"
                )
    finally:
        torch.set_num_threads(before)
    return "\n".join(lines)


def _mean(module: Fusion, h: Tensor) -> Fused:
    return Fused(h.mean(dim=0), h.new_full((len(h),), 1 / len(h)))


def _max(module: Fusion, h: Tensor) -> Fused:
    largest = h.amax(dim=0)
    wins = (h == largest).to(h.dtype)
    return Fused(largest, (wins / wins.sum(dim=0)).mean(dim=1))


def _attention(module: Fusion, h: Tensor) -> Fused:
    a = module.v(module.V(h).tanh()).squeeze(1).softmax(dim=0)
    return Fused(a @ h, a)


def _gated_attention(module: Fusion, h: Tensor) -> Fused:
    a = module.v(module.V(h).tanh() * module.U(h).sigmoid()).squeeze(1).softmax(dim=0)
    return Fused(a @ h, a)


def _value_gated_attention(module: Fusion, h: Tensor) -> Fused:
    a = module.v(module.V(h).tanh()).squeeze(1).softmax(dim=0)
    a = a * (module.g.exp() * (len(h) * a - 1)).sigmoid()
    a = a / a.sum()
    return Fused(a @ h, a)


def _per_feature_attention(module: Fusion, h: Tensor) -> Fused:
    a = module.v(module.V(h).tanh()).softmax(dim=0)
    return Fused((a * h).sum(dim=0), a.mean(dim=1))


def _agreement_attention(module: Fusion, h: Tensor) -> Fused:
    directions = normalize(h, dim=1)
    agreement = directions @ directions.mean(dim=0)
    a = (module.v(module.V(h).tanh()).squeeze(1) + module.s.exp() * agreement).softmax(dim=0)
    return Fused(a @ h, a)


def _geometric_median(module: Fusion, h: Tensor) -> Fused:
    a = h.new_full((len(h),), 1 / len(h))
    for _ in range(8):
        squares = (h - a @ h).square().sum(dim=1)
        a = (squares + 1e-3 * squares.mean() + torch.finfo(h.dtype).tiny).rsqrt()
        a = a / a.sum()
    return Fused(a @ h, a)


#: What one would write by hand for one set (n, d).
_BARE: dict[str, Callable[[Fusion, Tensor], Fused]] = {
    "mean": _mean,
    "max": _max,
    "attention": _attention,
    "gated_attention": _gated_attention,
    "value_gated_attention": _value_gated_attention,
    "per_feature_attention": _per_feature_attention,
    "agreement_attention": _agreement_attention,
    "geometric_median": _geometric_median,
}
