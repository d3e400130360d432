"""Head reads from a finished or observed anchor: in one evaluation, or averaged over several noise levels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mmdiff.errors import InputError
from mmdiff.model import MTDiffusionModel
from mmdiff.sampling.guidance import branches_of
from mmdiff.sampling.phases import DRAW
from mmdiff.sampling.request import Request
from mmdiff.schedulers import MTScheduler


def heads(
    model: MTDiffusionModel, scheduler: MTScheduler, values: Mapping[str, Tensor], concatenated: Iterable[str]
) -> dict[str, Tensor]:
    """{auxiliary: params} in one evaluation at t = T with z_T = 0; modalities that are not concatenated are absent.

    Args:
        model, scheduler: of the pipeline.
        values: of the observed modalities.
        concatenated: conditions in the observation channels.
    """
    count = len(next(iter(values.values())))
    z = torch.zeros(count, *model.space, device=model.device, dtype=model.value_dtype)
    return _params(model, z, scheduler.terminal_timestep, values, concatenated)


def heads_of_noised_anchor(
    model: MTDiffusionModel,
    scheduler: MTScheduler,
    values: Mapping[str, Tensor],
    concatenated: Iterable[str],
    levels: Iterable[int],
    noises: Iterable[Tensor],
) -> dict[str, Tensor]:
    """{auxiliary: params} of p_θ(x_i | z_t) averaged over timesteps; z_t is the anchor with ``noises`` (B, C, H, W)."""
    z_0 = model.modalities[model.anchor].encode(values[model.anchor])
    params = []
    for level, noise in zip(levels, noises, strict=False):
        z_t = scheduler.add_noise(z_0, noise, torch.full((len(z_0),), level, device=z_0.device))
        params.append(_params(model, z_t, level, values, concatenated))
    return {name: model.modalities[name].average([level[name] for level in params]) for name in params[0]}


def _params(
    model: MTDiffusionModel, z_t: Tensor, level: int, values: Mapping[str, Tensor], concatenated: Iterable[str]
) -> dict[str, Tensor]:
    branches = branches_of(model, values, (), concatenated, (), like=z_t)
    return model(z_t, torch.full((len(z_t),), level, device=z_t.device), branches.observation).params


def read_anchor(
    model: MTDiffusionModel, scheduler: MTScheduler, request: Request, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """{unobserved auxiliary: its mode or a draw (B, …)}, given the anchor and the concatenated conditions.

    A diffused modality that is read is absent, drawn or not: else its head would copy what it is shown.

    Args:
        model, scheduler: of the pipeline.
        request: of the call.
        values: of the observed modalities and of the anchor, observed or drawn.
    """
    concatenated, noise = request.conditioning.concatenated, request.noise(model)
    if request.levels is None:
        params = heads(model, scheduler, values, concatenated | {model.anchor})
    else:
        noises = (noise(model.space) for _ in request.levels)
        params = heads_of_noised_anchor(model, scheduler, values, concatenated, request.levels, noises)
    if request.phases.read != DRAW:
        return _modes(model, params, values)
    wanted = {name: model.modalities[name] for name in sorted(set(params) - set(values))}
    return {name: modality.sample(params[name], noise(modality.noise_shape)) for name, modality in wanted.items()}


def read_hidden_anchor(model: MTDiffusionModel, scheduler: MTScheduler, request: Request) -> dict[str, Tensor]:
    """The same without denoising; the anchor is from the head of a condition that predicts it.

    Raises:
        InputError: if no condition does.
    """
    modalities, concatenated = model.modalities, request.conditioning.concatenated
    predicting = [name for name in model.filling if name in concatenated]
    if not predicting:
        raise InputError("num_inference_steps", 0, "needs an observed modality whose head predicts the anchor")
    params = heads(model, scheduler, request.values, concatenated)
    anchor = modalities[predicting[0]].anchor_mode(params[predicting[0]])
    return {**_modes(model, params, request.values), model.anchor: anchor}


def _modes(model: MTDiffusionModel, params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: model.modalities[name].mode(head) for name, head in params.items() if name not in values}
