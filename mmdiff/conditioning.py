"""How observed values steer sampling (README, Theory, section 4): observation channels, guidance, what is fed back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.modalities import Modality
from mmdiff.model import MTDiffusionModel, MTDiffusionModelOutput

FEEDS = ("draw", "mean", "mode")


def feed_for(feed: str | None, stochastic: bool) -> str:
    """How unknown aggregated modalities enter z_t; by default what is right for the solver (Theory, section 5).

    Raises:
        InputError: on an unknown feed, and on "mode" with a deterministic solver, where it is wrong.
    """
    feed = feed or ("draw" if stochastic else "mean")
    if feed not in FEEDS:
        raise InputError("feed", feed, f"choose one of {', '.join(FEEDS)}")
    if feed == "mode" and not stochastic:
        raise InputError("feed", feed, "is wrong with a deterministic solver; use mean, or a stochastic solver")
    return feed


def fed_encoding(modality: Modality, params: Tensor, feed: str, drawn: Tensor) -> Tensor:
    """The encoding of an unknown modality from its head: E(draw), Σ_k p(k) E(k), or E(mode)."""
    if feed == "mean":
        return modality.expected_encoding(params)
    return modality.encode(drawn if feed == "draw" else modality.mode(params))


def aggregated_names(aggregate: bool | Iterable[str] | None, weighted: Mapping[str, float]) -> set[str]:
    """Which modalities take part in c_t: all with weights, none, or the named ones.

    Args:
        aggregate: True or None, False, or names.
        weighted: {modality: max_t W_t}.
    """
    able = {name for name, peak in weighted.items() if peak > 0}
    if aggregate is None or aggregate is True:
        return able
    names = set() if aggregate is False else {aggregate} if isinstance(aggregate, str) else set(aggregate)
    if names - able:
        raise InputError(
            "aggregate", sorted(names - able)[0], f"has no weight; weighted: {', '.join(sorted(able)) or 'none'}"
        )
    return names


def guidance_scales(guidance_scale: float | Mapping[str, float], observed: Iterable[str]) -> dict[str, float]:
    """{observed modality: scale}, those with scale 1 left out: they need no further evaluation."""
    observed = sorted(observed)
    if not isinstance(guidance_scale, Mapping):
        return {name: float(guidance_scale) for name in observed if guidance_scale != 1.0}
    if set(guidance_scale) - set(observed):
        name = sorted(set(guidance_scale) - set(observed))[0]
        raise InputError(f"guidance_scale.{name}", guidance_scale[name], "this modality is not observed")
    return {name: float(scale) for name, scale in sorted(guidance_scale.items()) if scale != 1.0}


def guided(
    model: MTDiffusionModel,
    sample: Tensor,
    timesteps: Tensor,
    values: Mapping[str, Tensor],
    aggregated: Mapping[str, Tensor],
    observed: Mapping[str, Tensor],
    scales: Mapping[str, float],
) -> MTDiffusionModelOutput:
    """Classifier-free guidance, every branch in one batch: full + Σ_i (s_i − 1) (full − full without i).

    With one observed modality this is the usual absent + s (observed − absent). The heads are those of the full branch.
    """
    branches = [model.observation(values, aggregated, observed, like=sample)]
    for name in scales:
        rest = {other: mask for other, mask in observed.items() if other != name}
        branches.append(model.observation(values, aggregated, rest, like=sample))
    if len(branches) == 1:
        return model(sample, timesteps, branches[0])
    count = len(branches)
    observation = type(branches[0])(*(torch.cat(parts) for parts in zip(*branches, strict=True)))
    output = model(sample.repeat(count, 1, 1, 1), timesteps.repeat(count), observation)
    full, *without = output.prediction.chunk(count)
    prediction = full + sum((scale - 1.0) * (full - part) for scale, part in zip(scales.values(), without, strict=True))
    return MTDiffusionModelOutput(
        prediction=prediction, params={name: params.chunk(count)[0] for name, params in output.params.items()}
    )
