"""FSDP2: weights, gradients, moments and averages in parts, of which every process holds one (Zhao et al., 2023,
arXiv 2304.11277; `torch.distributed.fsdp.fully_shard`)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mmdiff.config import TrainConfig
from mmdiff.errors import InputError
from mmdiff.training.checkpoint import (
    PARTS,
    Checkpoint,
    check_averages,
    check_fits,
    load_optimizer,
    new_checkpoint,
    optimizer_tensors,
)
from mmdiff.training.disk import PARTIAL
from mmdiff.training.ema import Ema
from mmdiff.training.parallel import MakeOptimizer, Replicated
from mmdiff.training.process import everywhere, on_main
from mmdiff.training.shards import laid_like, local, read_shards, whole, write_shards


class FullySharded(Replicated):
    """Blocks of the backbone are put together while they compute; all else stays together from the forward pass to the
    end of the backward pass. Scalars, which cannot be split, are whole on every process."""

    late = True
    in_place = False

    def __init__(self, accelerator: Accelerator, config: TrainConfig) -> None:
        super().__init__(accelerator, config)
        if config.mixed_precision == "fp16":
            raise InputError("train.mixed_precision", "fp16", "needs a loss scale, which FSDP2 lacks here; set bf16")

    def lay_out(self, bare: nn.Module, make_optimizer: MakeOptimizer) -> None:
        self.bare = self.objective = bare
        device, config = self.accelerator.device, self.config
        mesh = init_device_mesh(device.type, (self.accelerator.num_processes,))
        scalars = [p for p in bare.parameters() if p.ndim == 0]
        self._scalars = [p for p in scalars if p.requires_grad]
        # as autocast, which computes in bf16 with the weights of convolutions and matrices; gradients add in float32
        low = torch.bfloat16 if config.mixed_precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in bare.model.backbone.blocks():
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(bare, mesh=mesh, ignored_params=set(scalars))
        self.optimizer = make_optimizer(bare, config)

    def part(self, last: bool) -> Any:
        return self.accelerator.autocast()  # gradients are reduced in every part: none is ever held whole

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    @torch.no_grad()
    def update(self) -> Tensor:
        for p in self._scalars:
            if p.grad is not None:
                p.grad = self.accelerator.reduce(p.grad, reduction="mean")
        sharded, scalars = [], []
        for p in self.bare.parameters():
            if p.grad is not None:
                (sharded if isinstance(p.grad, DTensor) else scalars).append(local(p.grad))
        square = torch.stack(torch._foreach_norm(sharded)).square().sum()
        dist.all_reduce(square)
        norm = (square + sum(grad.square() for grad in scalars)).sqrt()
        factor = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        torch._foreach_mul_([*sharded, *scalars], factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One after the other, and kept on the CPU of the main process alone."""
        gathered = {}
        for name, tensor in tensors.items():
            full = whole(tensor)
            if self.accelerator.is_main_process:
                gathered[name] = full.cpu()
        return gathered

    def save(self, folder: Path, step: int, ema: Ema, rows: Tensor, facts: dict[str, Any]) -> None:
        """Every process writes its parts into one folder, which all of them must see."""
        everywhere(self.accelerator, lambda: check_averages(ema.tensors(), step))
        tensors = flat(self.bare.state_dict(), ema.tensors(), optimizer_tensors(self.optimizer))
        partial = folder / f"{PARTIAL}step-{step}"
        with contextlib.ExitStack() as held:  # of the main process

            def begin() -> None:
                held.enter_context(new_checkpoint(folder, step, facts, self.config.keep_checkpoints))
                save_file({"terms": rows.contiguous()}, partial / "window.safetensors")

            on_main(self.accelerator, begin)
            write_shards(partial, tensors)
            on_main(self.accelerator, held.close)

    def load(self, checkpoint: Checkpoint, ema: Ema) -> None:
        own = self.bare.state_dict()
        check_fits(checkpoint.path, own, checkpoint.layout("weights"))
        check_fits(checkpoint.path, ema.tensors(), checkpoint.layout("ema"))
        moments = self._blank(checkpoint.layout("optimizer"))
        tensors = flat(own, ema.tensors(), moments)
        if checkpoint.sharded:
            read_shards(checkpoint.path, tensors)
        else:
            for name, tensor in flat(checkpoint.weights, checkpoint.ema, checkpoint.optimizer).items():
                local(tensors[name]).copy_(local(laid_like(tensors[name], tensor)))
        load_optimizer(self.optimizer, moments)

    def _blank(self, layout: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Zeros for the optimizer's state, laid out like the parameters that it belongs to."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        blank = {}
        for name, tensor in layout.items():
            p = parameters[int(name.split(".", 1)[0])]
            like_it = tensor.shape == p.shape
            blank[name] = torch.zeros_like(p) if like_it else torch.zeros(tensor.shape, dtype=tensor.dtype)
        return blank


def flat(*parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights, averages and the optimizer's state as one {"<part>.<name>": tensor}."""
    return {f"{part}.{n}": t for part, tensors in zip(PARTS, parts, strict=False) for n, t in tensors.items()}
