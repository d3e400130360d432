"""How conditions steer sampling (docs/theory.md, section 5): methods, modalities and scales, checked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.model import MTDiffusionModel
from mmdiff.schedulers import MTScheduler
from mmdiff.values import names, plain

CONCATENATION, AGGREGATION, HEAD_GUIDANCE, REPLACEMENT = METHODS = (
    "concatenation",
    "aggregation",
    "head-guidance",
    "replacement",
)
FEEDBACKS = ("draw", "mean", "mode")
LONGEST = 1000  # jump of resampling; RePaint takes 10
Methods = str | Iterable[str]


@dataclass(frozen=True)
class Conditioning:
    """The effect of every auxiliary modality on the reverse process.

    Attributes:
        concatenated: conditions in the observation channels.
        aggregated: conditions in c_t.
        replaced: conditions whose known parts of z_0 replacement keeps.
        fed_back: unobserved modalities in c_t, predicted by their heads.
        guidance: {condition: scale of classifier-free guidance}.
        head_guidance: {condition: scale of head guidance}.
        resampling: (jump_length, jump_n_sample) of replacement.
    """

    concatenated: frozenset[str]
    aggregated: frozenset[str]
    replaced: frozenset[str]
    fed_back: frozenset[str]
    guidance: dict[str, float]
    head_guidance: dict[str, float]
    resampling: tuple[int, int]

    @property
    def in_mean(self) -> frozenset[str]:
        """All modalities in c_t."""
        return self.aggregated | self.fed_back

    @property
    def left_out(self) -> tuple[str, ...]:
        """The conditions that one further branch each leaves out."""
        return tuple(sorted(set(self.guidance) | (set(self.head_guidance) & self.concatenated)))


def conditioning_of(
    model: MTDiffusionModel,
    values: Mapping[str, Tensor],
    conditioning: Methods | Mapping[str, Methods] | None,
    aggregated: set[str],
    guidance_scale: float | Mapping[str, float] = 1.0,
    head_guidance_scale: float | Mapping[str, float] = 1.0,
    resampling: tuple[int, int] = (2, 5),
    denoising: bool = True,
) -> Conditioning:
    """The checked conditioning of a call.

    Args:
        model: the networks.
        values: of the observed modalities; an observed anchor is no condition, the heads read it.
        conditioning: one or several of `METHODS`, for every condition that can use them; or {condition: methods}; or
            None: as trained (concatenation if training concatenated the condition, aggregation if it has weights; if
            neither, replacement or head guidance).
        aggregated: modalities that take part in c_t, see `aggregated_names`.
        guidance_scale, head_guidance_scale, resampling: as of the pipeline.
        denoising: False if only the heads are read; conditions can only be concatenated then.

    Raises:
        InputError: naming the argument, the value and the remedy.
    """
    observed = sorted(set(values) - {model.anchor})
    denoising = denoising and model.anchor not in values
    usable = {name: usable_methods(model, name, aggregated, denoising) for name in observed}
    chosen = {name: _as_trained(methods) for name, methods in usable.items()}
    for name in (name for name, methods in chosen.items() if denoising and not methods):
        raise InputError(f"observed.{name}", "a value", _remedy(usable[name]))
    if isinstance(conditioning, Mapping):
        chosen |= _by_name(conditioning, usable)
    elif conditioning is not None:
        chosen = _for_all(_as_methods("conditioning", conditioning), usable)

    def using(method: str) -> frozenset[str]:
        return frozenset(name for name in observed if method in chosen[name])

    return Conditioning(
        concatenated=using(CONCATENATION),
        aggregated=using(AGGREGATION),
        replaced=using(REPLACEMENT),
        fed_back=frozenset(aggregated - set(values)),
        guidance=guidance_scales(guidance_scale, observed, using(CONCATENATION)),
        head_guidance=head_guidance_scales(head_guidance_scale, using(HEAD_GUIDANCE)),
        resampling=_checked_resampling(resampling),
    )


def usable_methods(model: MTDiffusionModel, name: str, aggregated: set[str], denoising: bool = True) -> frozenset[str]:
    """The methods that a condition can use."""
    usable = {
        CONCATENATION: name in model.observable,
        AGGREGATION: denoising and name in aggregated,
        HEAD_GUIDANCE: denoising and name in model.generated and name not in model.filling,
        REPLACEMENT: denoising and name in model.filling,
    }
    return frozenset(method for method in METHODS if usable[method])


def methods_of_text(text: str) -> frozenset[str]:
    """ "concatenation+head-guidance" -> its methods."""
    return _as_methods("conditioning", text.split("+"))


def _as_trained(usable: frozenset[str]) -> frozenset[str]:
    trained = usable & {CONCATENATION, AGGREGATION}
    return trained or frozenset([method for method in (REPLACEMENT, HEAD_GUIDANCE) if method in usable][:1])


def _as_methods(key: str, value: Methods) -> frozenset[str]:
    methods = names(key, value)
    for method in methods:
        if method not in METHODS:
            raise InputError(key, method, f"choose from {', '.join(METHODS)}")
    if not methods:
        remedy = f"names no method; choose from {', '.join(METHODS)}, or leave the modality unobserved"
        raise InputError(key, methods, remedy)
    return frozenset(methods)


def _by_name(conditioning: Mapping[str, Methods], usable: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """{condition: methods}, each of which it must be able to use."""
    chosen = {}
    for name, value in conditioning.items():
        if name not in usable:
            raise InputError(f"conditioning.{name}", value, "is no observed auxiliary modality")
        chosen[name] = _as_methods(f"conditioning.{name}", value)
        for method in sorted(chosen[name] - usable[name]):
            raise InputError(f"conditioning.{name}", method, _remedy(usable[name]))
    return chosen


def _for_all(methods: frozenset[str], usable: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """{condition: those of the methods that it can use}. A condition without a method is refused, and vice versa."""
    for name, possible in usable.items():
        if not possible & methods:
            remedy = f"cannot use observed {name}: {_remedy(possible)}"
            raise InputError("conditioning", "+".join(sorted(methods)), remedy)
    for method in sorted(methods):
        if usable and not any(method in possible for possible in usable.values()):
            raise InputError("conditioning", method, f"no observed modality can use it: {', '.join(usable)}")
    return {name: possible & methods for name, possible in usable.items()}


def _remedy(usable: frozenset[str]) -> str:
    methods = ", ".join(method for method in METHODS if method in usable)
    return f"here it can use {methods}" if methods else "here nothing can use it; leave it unobserved"


def _checked_resampling(resampling: tuple[int, int]) -> tuple[int, int]:
    jumps = tuple(resampling) if isinstance(resampling, list | tuple) else (resampling,)
    if len(jumps) != 2 or not all(type(jump) is int and 1 <= jump <= LONGEST for jump in jumps):
        remedy = f"needs (jump_length, jump_n_sample), two numbers from 1 to {LONGEST}; (1, 1) is off"
        raise InputError("resampling", resampling, remedy)
    return jumps[0], jumps[1]


def feedback_for(feedback: str | None, stochastic: bool) -> str:
    """How unobserved aggregated modalities re-enter c_t; the default depends on the solver.

    Raises:
        InputError: for an unknown feedback, and for "mode" with a deterministic solver.
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


def aggregated_names(
    aggregate: bool | Iterable[str] | None, weighted: Mapping[str, float], unknown: Collection[str] = ()
) -> set[str]:
    """The modalities in c_t: all with weights, none, or the named ones.

    Args:
        aggregate: True or None, False, or names.
        weighted: {modality: max_t W_t}.
        unknown: diffused modalities that are not observed: their values, of which c_t would be made, are drawn last.
    """
    positive = {name for name, peak in weighted.items() if peak > 0 and name not in unknown}
    aggregate = True if aggregate is None else plain("aggregate", aggregate)
    if isinstance(aggregate, bool):
        return positive if aggregate else set()
    chosen = set(names("aggregate", aggregate))
    for name in sorted(chosen & set(unknown)):
        raise InputError("aggregate", name, "is diffused, so it can be aggregated only where it is observed")
    for name in sorted(chosen - positive):
        raise InputError("aggregate", name, f"has no weight; weighted: {', '.join(sorted(positive)) or 'none'}")
    return chosen


def guidance_scales(
    guidance_scale: float | Mapping[str, float], observed: Iterable[str], concatenated: Iterable[str] | None = None
) -> dict[str, float]:
    """{condition: scale} of classifier-free guidance, without those of scale 1, which need no further evaluation.

    Args:
        guidance_scale: one number for all, or one per modality.
        observed: names of the conditions.
        concatenated: those in the observation channels, which guidance needs. Default: all.
    """
    observed = sorted(observed)
    able = set(observed if concatenated is None else concatenated)
    if not isinstance(guidance_scale, Mapping):
        if observed and not able and guidance_scale != 1.0:
            remedy = "needs an observed modality in conditioning concatenation"
            raise InputError("guidance_scale", guidance_scale, remedy)
        return {name: float(guidance_scale) for name in observed if name in able and guidance_scale != 1.0}
    for name in sorted(set(guidance_scale) - able):
        remedy = "needs conditioning concatenation" if name in observed else "this modality is not observed"
        raise InputError(f"guidance_scale.{name}", guidance_scale[name], remedy)
    return {name: float(scale) for name, scale in sorted(guidance_scale.items()) if scale != 1.0}


def head_guidance_scales(scale: float | Mapping[str, float], guiding: Iterable[str]) -> dict[str, float]:
    """{condition: scale} of head guidance, without those of scale 0. The default 1 is exact for exact heads."""
    guiding = sorted(guiding)
    if not isinstance(scale, Mapping):
        return {name: float(scale) for name in guiding if scale != 0.0}
    for name in sorted(set(scale) - set(guiding)):
        raise InputError(f"head_guidance_scale.{name}", scale[name], "needs conditioning head-guidance")
    return {name: float(scale.get(name, 1.0)) for name in guiding if scale.get(name, 1.0) != 0.0}
