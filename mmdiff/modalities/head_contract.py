"""The laws of a modality's head, as checks; see `contract`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from mmdiff.modalities.base import Modality, Shape
from mmdiff.modalities.diffusible import Diffusible
from mmdiff.modalities.expectations import ROWS, equal, examples_of, expect, expect_shape, noise_of, params_of

Build = Callable[[Shape], Modality]


def likelihood(build: Build, shape: Shape) -> None:
    """`nll` is one finite number per sample, of that sample alone."""
    modality = build(shape)
    params, examples = params_of(modality, shape), examples_of(modality)
    expect(len(params) == ROWS, f"decode gives {len(params)} rows for {ROWS}, expected the batch first")
    nll = modality.nll(params, examples)
    expect_shape("nll(params, value)", nll, (ROWS,))
    expect(equal(modality.nll(params[:5], examples[:5]), nll[:5]), "nll depends on the other rows of the batch")
    expect(modality.dimensions >= 1, f"dimensions is {modality.dimensions}, expected a positive number")


def sampling(build: Build, shape: Shape) -> None:
    """`sample` is a function of params and noise per sample, and gives valid values."""
    modality = build(shape)
    params, noise = params_of(modality, shape), noise_of(modality)
    drawn = modality.sample(params, noise)
    modality.check(drawn)
    expect(torch.equal(modality.sample(params, noise), drawn), "sample differs between two calls: use only the noise")
    expect(equal(modality.sample(params[:5], noise[:5]), drawn[:5]), "sample depends on the other rows of the batch")
    expect(not torch.equal(modality.sample(params, -noise), drawn), "sample does not depend on the noise")


def mode(build: Build, shape: Shape) -> None:
    """Nothing is likelier than the mode."""
    modality = build(shape)
    params = params_of(modality, shape)
    best = modality.mode(params)
    modality.check(best)
    worse = (modality.nll(params, modality.sample(params, noise_of(modality))) - modality.nll(params, best)).detach()
    expect(bool((worse > -1e-4).all()), f"a draw is likelier than the mode, by {-float(worse.min()):.3g} nats")


def expected_encoding(build: Build, shape: Shape, draws: int = 2000) -> None:
    """`expected_encoding` is the mean encoding of draws."""
    modality = build(shape)
    with torch.no_grad():
        params = params_of(modality, shape, 1)
        expected = modality.expected_encoding(params)
        expect_shape("expected_encoding(params)", expected, (1, *shape.space))
        if modality.aggregable:
            rows = params.expand(draws, *params.shape[1:])
            encoded = modality.encode(modality.sample(rows, noise_of(modality, draws)))
            gap = float((encoded.mean(0) - expected[0]).square().mean().sqrt())
            allowed = 0.02 + 3 * float(encoded.std(0).square().mean().sqrt()) / math.sqrt(draws)
            expect(gap < allowed, f"expected_encoding is {gap:.3g} (RMS) from the mean over {draws} draws")


def expected_signal(build: Build, shape: Shape, draws: int = 2000) -> None:
    """Where it can be diffused: one signal, whose `expected_signal` is the mean over draws."""
    modality = build(shape)
    if not isinstance(modality, Diffusible):
        return
    both = modality.observation_channels and modality.context_width
    expect(not both, "it has channels and a context; a signal is one of them")
    with torch.no_grad():
        params = params_of(modality, shape, 1)
        expected = modality.expected_signal(params)
        expect_shape("expected_signal(params)", expected, (1, *modality.signal_shape))
        drawn = modality.signal(modality.sample(params.expand(draws, *params.shape[1:]), noise_of(modality, draws)))
        expect_shape("signal(value)", drawn, (draws, *modality.signal_shape))
        gap = float((drawn.mean(0) - expected[0]).square().mean().sqrt())
        allowed = 0.02 + 3 * float(drawn.std(0).square().mean().sqrt()) / math.sqrt(draws)
        expect(gap < allowed, f"expected_signal is {gap:.3g} (RMS) from the mean over {draws} draws")


def average(build: Build, shape: Shape) -> None:
    """The average of one distribution with itself is that distribution."""
    modality = build(shape)
    params, examples = params_of(modality, shape), examples_of(modality)
    averaged = modality.average([params, params])
    expect_shape("average([params, params])", averaged, tuple(params.shape))
    same = equal(modality.nll(averaged, examples), modality.nll(params, examples))
    expect(same, "average([params, params]) has another nll than params")


HEAD_LAWS: dict[str, Callable[[Build, Shape], None]] = {
    "likelihood": likelihood,
    "sampling": sampling,
    "mode": mode,
    "expected encoding": expected_encoding,
    "expected signal": expected_signal,
    "average": average,
}
