"""What the state of a run takes on one process, for each launch file of experiments/accelerate, and what an image adds.

All in float32, as the weights are, whatever `train.mixed_precision` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mmdiff.build import Experiment
from mmdiff.data.order import Visit
from mmdiff.objective import BatchPosition, MTObjective

PROCESSES = 8  # as the launch files start
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class State:
    """Numbers, each a float32, that a run keeps on all its processes together.

    Attributes:
        weights: all parameters.
        trained: those with a gradient.
        moments: of the optimizer.
        averages: of all averages.
        gathered: parameters of a block and of all that is in no block: FSDP2 puts them together while they compute.
    """

    weights: int
    trained: int
    moments: int
    averages: int
    gathered: int

    def bytes(self, launch_file: str, processes: int) -> dict[str, float]:
        """{what: bytes} on one process.

        Args:
            launch_file: one of `LAUNCH_FILES`.
            processes: of the run.
        """
        whole, parts = _FLOAT, _FLOAT / processes
        if launch_file == "fsdp2":
            held = 2 * _FLOAT * self.gathered  # their weights and gradients
            sizes = self.weights * parts, self.trained * parts, self.moments * parts, self.averages * parts, held
        elif launch_file == "deepspeed_zero2":  # and a copy of its part of the weights, which the optimizer changes
            sizes = self.weights * whole, self.trained * parts, (self.moments + self.trained) * parts
            sizes = *sizes, self.averages * whole, 0
        else:
            sizes = self.weights * whole, self.trained * whole, self.moments * whole, self.averages * whole, 0
        return dict(zip(("weights", "gradients", "moments", "averages", "gathered"), sizes, strict=True))


LAUNCH_FILES = ("cpu", "ddp", "fsdp2", "deepspeed_zero2")


def state_of(objective: MTObjective, moments: int, averages: int) -> State:
    """Of an objective whose weights are whole.

    Args:
        objective: that is trained.
        moments: numbers that the optimizer keeps.
        averages: numbers of all averages.
    """
    sizes = {p: p.numel() for p in objective.parameters()}
    blocks = [sum(p.numel() for p in block.parameters()) for block in objective.model.backbone.blocks()]
    trained = sum(count for p, count in sizes.items() if p.requires_grad)
    weights = sum(sizes.values())
    return State(weights, trained, moments, averages, weights - sum(blocks) + max(blocks, default=0))


def table(state: State, processes: int) -> list[str]:
    """A line per launch file: bytes per parameter, and the sum in GiB, on one process.

    Args:
        state: of the run.
        processes: of the run; one process counts as a run of `PROCESSES`.
    """
    count = processes if processes > 1 else PROCESSES
    head = f"memory of the state on one process, {count} of them (cpu: 1), in bytes per parameter"
    columns = ("weights", "gradients", "moments", "averages", "gathered", "sum")
    lines = [head, f"{'launch file':<17}" + "".join(f"{column:>10}" for column in columns)]
    for name in LAUNCH_FILES:
        sizes = state.bytes(name, 1 if name == "cpu" else count)
        cells = [size / state.weights for size in sizes.values()]
        row = "".join(f"{cell:10.2f}" for cell in (*cells, sum(cells)))
        lines.append(f"{name:<17}{row}  {sum(sizes.values()) / 2**30:.3f} GiB")
    return lines


def kept_per_image(experiment: Experiment, accelerator: Accelerator, size: int) -> tuple[float, float]:
    """Measured at ``size`` and 2 ``size`` images: bytes that autograd keeps for every image, and for none.

    Args:
        experiment: whose objective lies whole on the device.
        accelerator: of the run, for its precision.
        size: of the smaller batch.
    """
    one, two = (_kept(experiment, accelerator, count) for count in (size, 2 * size))
    return (two - one) / size, max(0.0, 2 * one - two)


def _kept(experiment: Experiment, accelerator: Accelerator, size: int) -> int:
    objective, device = experiment.objective, accelerator.device
    batch = experiment.train.__getitems__([Visit(k, k) for k in range(size)]).to(device)
    saved = SavedBytes(objective)
    with saved_tensors_hooks(saved.keep, saved.give), accelerator.autocast():
        objective(batch, BatchPosition(0, torch.arange(size, device=device), size)).loss.backward()
    for p in objective.parameters():
        p.grad = None
    return saved.bytes


class SavedBytes:
    """Adds up what autograd keeps: every storage once, parameters not at all; ``bytes`` is the largest part's."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self._seen: set[int] = set()
        self._part, self._over, self.bytes = 0, True, 0

    def keep(self, tensor: Tensor) -> Tensor:
        """In the forward pass."""
        if self._over:  # the part before this one has gone backward
            self._seen, self._part, self._over = set(self._parameters), 0, False
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._part += storage.nbytes()
            self.bytes = max(self.bytes, self._part)
        return tensor

    def give(self, tensor: Tensor) -> Tensor:
        """In the backward pass."""
        self._over = True
        return tensor
