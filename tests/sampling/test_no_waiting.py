"""The host never waits for an accelerator inside a step of training or of sampling."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import pytest
import torch
from networks import random_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmdiff.data import Batch
from mmdiff.objective import BatchPosition, MTObjective
from mmdiff.pipeline import MTDiffusionPipeline
from mmdiff.sampling.request import request_of
from mmdiff.sampling.reverse_step import ReverseStep
from mmdiff.schedulers import MTDiffusionScheduler
from mmdiff.states import StateProbabilities

MODALITIES = {
    "image": {"kind": "image", "channels": 3, "size": 8},
    "label": {"kind": "label", "num_classes": 3},
    "mask": {"kind": "mask", "num_classes": 4, "size": 8},
    "masked_image": {"kind": "masked_image", "channels": 3, "size": 8},
    "embedding": {"kind": "embedding", "dim": 5, "log_norm_mean": 1.0, "log_norm_std": 0.2},
}


class _NoReads(TorchDispatchMode):
    """Refuses whatever would make the host wait for an accelerator; the solver's tables lie on the CPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"}
        tensors = [a for a in args if isinstance(a, Tensor)]
        if function.overloadpacket.__name__ in waits and any(t.is_meta for t in tensors):
            raise AssertionError(f"{function} reads the device")
        if function.overloadpacket.__name__ in ("_to_copy", "copy_"):
            target = (kwargs or {}).get("device")
            assert target is None or torch.device(target).type == tensors[0].device.type, "a copy between devices"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("diffused", [None, {"mask": 1.0, "embedding": 1.0}])
def test_a_step_of_sampling_or_training_reads_nothing_from_the_device(diffused: dict[str, float] | None) -> None:
    """On the meta device, which has no values to read and cannot be copied from."""
    model = random_model(MODALITIES, diffused=diffused)
    scheduler = MTDiffusionScheduler(weights={"label": {"scale": 0.5}}, solver="DDIMScheduler")
    objective = MTObjective(model, scheduler, dict.fromkeys(model.names, StateProbabilities(0.4, 0.3)), {"label": 0.1})
    objective.to("meta")
    values = {name: model.modalities[name].examples(4, torch.Generator()).to("meta") for name in model.names}
    batch = Batch(values, dict.fromkeys(values, torch.ones(4, dtype=torch.bool, device="meta")))
    where = BatchPosition(0, torch.arange(4, device="meta"), 4)
    parameters = {name: p.default for name, p in inspect.signature(MTDiffusionPipeline.__call__).parameters.items()}
    request = request_of(model, scheduler, parameters | {"batch_size": 4, "num_inference_steps": 3})
    step = ReverseStep(model, scheduler, request, diffused or ())
    z_t = step.start()
    for index in range(2):  # the first fills the caches
        with _NoReads() if index else contextlib.nullcontext():
            objective(batch, where).loss.backward()
            with torch.no_grad():
                z_t = step(z_t, index)
    assert z_t.is_meta


@torch.no_grad()
def test_a_step_reads_the_heads_that_it_uses_and_the_last_one_all_unobserved() -> None:
    """The label is fed back in every step; mask and embedding are drawn once, in the last."""
    scheduler = MTDiffusionScheduler(weights={"label": {"scale": 0.5}}, solver="DDIMScheduler")
    model, read = random_model(MODALITIES), []
    model.register_forward_hook(lambda *call: read.append(set(call[2].params)))
    parameters = {name: p.default for name, p in inspect.signature(MTDiffusionPipeline.__call__).parameters.items()}
    asked = {"batch_size": 2, "num_inference_steps": 3, "final_read": False}
    step = ReverseStep(model, scheduler, request_of(model, scheduler, parameters | asked))
    z_t = step.start()
    for index in range(3):
        z_t = step(z_t, index)
    assert read == [{"label"}, {"label"}, set(model.generated)]
    assert set(step.draws) == set(model.generated) and len(model.generated) == 4
