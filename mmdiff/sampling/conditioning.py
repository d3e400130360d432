"""How observed values are asked to steer sampling (docs/theory.md, section 5): ways, names and scales, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.modalities import Modality
from mmdiff.model import MTDiffusionModel
from mmdiff.schedulers import MTScheduler
from mmdiff.values import names, plain

CONCATENATION, AGGREGATION, HEAD_GUIDANCE, REPLACEMENT = WAYS = (
    "concatenation",
    "aggregation",
    "head-guidance",
    "replacement",
)
FEEDBACKS = ("draw", "mean", "mode")
LONGEST = 1000  # of resampling; RePaint takes 10
Ways = str | Iterable[str]


@dataclass(frozen=True)
class Conditioning:
    """What every observed auxiliary modality does to the reverse process.

    Attributes:
        concatenated: shown to the network in their observation channels.
        aggregated: whose values stand in c_t.
        replaced: whose known parts of z_0 replacement holds fixed.
        fed: unknown ones that stand in c_t, read from their heads.
        guidance: {name: scale of the classifier-free guidance}.
        head_guidance: {name: scale of the guidance by its head}.
        resampling: (jump_length, jump_n_sample) of replacement.
    """

    concatenated: frozenset[str]
    aggregated: frozenset[str]
    replaced: frozenset[str]
    fed: frozenset[str]
    guidance: dict[str, float]
    head_guidance: dict[str, float]
    resampling: tuple[int, int]

    @property
    def in_mean(self) -> frozenset[str]:
        """All that stand in c_t."""
        return self.aggregated | self.fed

    @property
    def left_out(self) -> tuple[str, ...]:
        """The observed modalities that a branch of their own does without."""
        return tuple(sorted(set(self.guidance) | (set(self.head_guidance) & self.concatenated)))


def conditioning_of(
    model: MTDiffusionModel,
    values: Mapping[str, Tensor],
    conditioning: Ways | Mapping[str, Ways] | None,
    aggregated: set[str],
    guidance_scale: float | Mapping[str, float] = 1.0,
    head_guidance_scale: float | Mapping[str, float] = 1.0,
    resampling: tuple[int, int] = (2, 5),
    denoising: bool = True,
) -> Conditioning:
    """The checked plan of a call.

    Args:
        model: the networks.
        values: of the observed modalities; the anchor's steers nothing, it is read.
        conditioning: a way or several of `WAYS` for every observed modality that can use it, or {modality: ways}, or
            None: as trained (the channels where training ever showed the modality as observed, c_t where it is
            aggregated; where neither holds, replacement or head-guidance).
        aggregated: modalities that take part in c_t, see `aggregated_names`.
        guidance_scale, head_guidance_scale, resampling: see the pipeline.
        denoising: False where the heads are read at once; only channels can be used then.

    Raises:
        InputError: naming the argument, the value and the remedy.
    """
    observed = sorted(set(values) - {model.anchor})
    denoising = denoising and model.anchor not in values
    able = {name: _able(model, name, aggregated, denoising) for name in observed}
    ways = {name: _as_trained(found) for name, found in able.items()}
    for name in (name for name, found in ways.items() if denoising and not found):
        raise InputError(f"observed.{name}", "a value", _remedy(able[name]))
    if isinstance(conditioning, Mapping):
        ways |= _named(conditioning, able)
    elif conditioning is not None:
        ways = _common(_as_ways("conditioning", conditioning), able)

    def using(way: str) -> frozenset[str]:
        return frozenset(name for name in observed if way in ways[name])

    return Conditioning(
        concatenated=using(CONCATENATION),
        aggregated=using(AGGREGATION),
        replaced=using(REPLACEMENT),
        fed=frozenset(aggregated - set(values)),
        guidance=guidance_scales(guidance_scale, observed, using(CONCATENATION)),
        head_guidance=head_guidance_scales(head_guidance_scale, using(HEAD_GUIDANCE)),
        resampling=_checked_resampling(resampling),
    )


def _able(model: MTDiffusionModel, name: str, aggregated: set[str], denoising: bool) -> frozenset[str]:
    """The ways that this modality can use."""
    modality: Modality = model.modalities[name]
    able = {
        CONCATENATION: name in model.observable,
        AGGREGATION: denoising and name in aggregated,
        HEAD_GUIDANCE: denoising and modality.generated and not modality.predicts_anchor,
        REPLACEMENT: denoising and modality.fixes_anchor,
    }
    return frozenset(way for way in WAYS if able[way])


def usable_ways(model: MTDiffusionModel, name: str, aggregated: set[str]) -> frozenset[str]:
    """The ways that an auxiliary modality can use while the anchor is denoised."""
    return _able(model, name, aggregated, True)


def ways_of_text(text: str) -> frozenset[str]:
    """ "concatenation+head-guidance" -> its ways."""
    return _as_ways("conditioning", text.split("+"))


def _as_trained(able: frozenset[str]) -> frozenset[str]:
    trained = able & {CONCATENATION, AGGREGATION}
    return trained or frozenset([way for way in (REPLACEMENT, HEAD_GUIDANCE) if way in able][:1])


def _as_ways(key: str, given: Ways) -> frozenset[str]:
    ways = names(key, given)
    for way in ways:
        if way not in WAYS:
            raise InputError(key, way, f"choose from {', '.join(WAYS)}")
    if not ways:
        raise InputError(key, ways, f"names no way; choose from {', '.join(WAYS)}, or leave the modality unobserved")
    return frozenset(ways)


def _named(conditioning: Mapping[str, Ways], able: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """{modality: ways}, all of which it must be able to use."""
    found = {}
    for name, given in conditioning.items():
        if name not in able:
            raise InputError(f"conditioning.{name}", given, "is no observed auxiliary modality")
        found[name] = _as_ways(f"conditioning.{name}", given)
        for way in sorted(found[name] - able[name]):
            raise InputError(f"conditioning.{name}", way, _remedy(able[name]))
    return found


def _common(ways: frozenset[str], able: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """The same ways for all: each modality uses those it can; each needs one, and each way a modality."""
    for name, found in able.items():
        if not found & ways:
            raise InputError("conditioning", "+".join(sorted(ways)), f"cannot use observed {name}: {_remedy(found)}")
    for way in sorted(ways):
        if able and not any(way in found for found in able.values()):
            raise InputError("conditioning", way, f"no observed modality can use it: {', '.join(able)}")
    return {name: found & ways for name, found in able.items()}


def _remedy(able: frozenset[str]) -> str:
    """Why ways fail: channels were not trained, c_t has no weight, a head or the anchor does not allow it."""
    ways = ", ".join(way for way in WAYS if way in able)
    return f"here it can use {ways}" if ways else "here nothing can use it; leave it unobserved"


def _checked_resampling(resampling: tuple[int, int]) -> tuple[int, int]:
    jumps = tuple(resampling) if isinstance(resampling, list | tuple) else (resampling,)
    if len(jumps) != 2 or not all(type(jump) is int and 1 <= jump <= LONGEST for jump in jumps):
        remedy = f"needs (jump_length, jump_n_sample), two numbers from 1 to {LONGEST}; (1, 1) is off"
        raise InputError("resampling", resampling, remedy)
    return jumps[0], jumps[1]


def feedback_for(feedback: str | None, stochastic: bool) -> str:
    """How unknown aggregated modalities enter z_t; by default what is right for the solver (docs/theory.md, section 5).

    Raises:
        InputError: on an unknown feedback, and on "mode" with a deterministic solver, where it is wrong.
    """
    feedback = ("draw" if stochastic else "mean") if feedback is None else feedback
    if not isinstance(feedback, str) or feedback not in FEEDBACKS:
        raise InputError("feedback", feedback, f"choose one of {', '.join(FEEDBACKS)}")
    if feedback == "mode" and not stochastic:
        raise InputError("feedback", feedback, "is wrong with a deterministic solver; use mean, or a stochastic solver")
    return feedback


def peak_weights(scheduler: MTScheduler) -> dict[str, float]:
    """{modality: max_t W_t}."""
    return {name: float(scheduler.cumulative_weights(name).detach().max()) for name in scheduler.config.weights or {}}


def aggregated_names(aggregate: bool | Iterable[str] | None, weighted: Mapping[str, float]) -> set[str]:
    """Which modalities take part in c_t: all with weights, none, or the named ones.

    Args:
        aggregate: True or None, False, or names.
        weighted: {modality: max_t W_t}.
    """
    able = {name for name, peak in weighted.items() if peak > 0}
    aggregate = True if aggregate is None else plain("aggregate", aggregate)
    if isinstance(aggregate, bool):
        return able if aggregate else set()
    chosen = set(names("aggregate", aggregate))
    if chosen - able:
        raise InputError(
            "aggregate", sorted(chosen - able)[0], f"has no weight; weighted: {', '.join(sorted(able)) or 'none'}"
        )
    return chosen


def guidance_scales(
    guidance_scale: float | Mapping[str, float], observed: Iterable[str], channels: Iterable[str] | None = None
) -> dict[str, float]:
    """{observed modality: scale}, those with scale 1 left out: they need no further evaluation.

    Args:
        guidance_scale: one number for all, or one per modality.
        observed: names.
        channels: those of them that the network is shown; guidance needs that. Default: all.
    """
    observed = sorted(observed)
    shown = set(observed if channels is None else channels)
    if not isinstance(guidance_scale, Mapping):
        if observed and not shown and guidance_scale != 1.0:
            raise InputError(
                "guidance_scale", guidance_scale, "needs an observed modality in conditioning concatenation"
            )
        return {name: float(guidance_scale) for name in observed if name in shown and guidance_scale != 1.0}
    for name in sorted(set(guidance_scale) - shown):
        unseen = "needs conditioning concatenation" if name in observed else "this modality is not observed"
        raise InputError(f"guidance_scale.{name}", guidance_scale[name], unseen)
    return {name: float(scale) for name, scale in sorted(guidance_scale.items()) if scale != 1.0}


def head_guidance_scales(scale: float | Mapping[str, float], guiding: Iterable[str]) -> dict[str, float]:
    """{head-guiding modality: scale}, by default 1, which is exact for exact heads; those with scale 0 left out."""
    guiding = sorted(guiding)
    if not isinstance(scale, Mapping):
        return {name: float(scale) for name in guiding if scale != 0.0}
    for name in sorted(set(scale) - set(guiding)):
        raise InputError(f"head_guidance_scale.{name}", scale[name], "needs conditioning head-guidance")
    return {name: float(scale.get(name, 1.0)) for name in guiding if scale.get(name, 1.0) != 0.0}
