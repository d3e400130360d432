"""ZeRO-2 by DeepSpeed: gradients and moments in parts, weights and averages whole on every process (Rajbhandari et al.,
2020, arXiv 1910.02054)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmdiff.errors import InputError
from mmdiff.training.checkpoint import Checkpoint, check_fits
from mmdiff.training.ema import Ema
from mmdiff.training.parallel import MakeOptimizer, Replicated

LARGEST_BUCKET = 10**8  # half of the numbers that are averaged at once
_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedZero2(Replicated):
    """DeepSpeed's engine clips, steps and clears the gradients. Checkpoints are those of `Replicated`: the moments are
    put together for them."""

    late = True

    def lay_out(self, bare: nn.Module, make_optimizer: MakeOptimizer) -> None:
        config, deepspeed = self.config, _deepspeed()
        if config.optimizer != "adamw":
            raise InputError("train.optimizer", config.optimizer, "needs whole matrices; set adamw, or sharding: fsdp2")
        if config.mixed_precision == "fp16":
            raise InputError("train.mixed_precision", "fp16", "needs a loss scale, which ZeRO-2 lacks here; set bf16")
        if config.mixed_precision == "bf16":  # DeepSpeed switches autocast off around the module
            bare.forward = torch.autocast(self.accelerator.device.type, torch.bfloat16)(bare.forward)
        self.bare, optimizer = bare, make_optimizer(bare, config)
        self._trained = [p for group in optimizer.param_groups for p in group["params"]]
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # DeepSpeed takes a step at once, to have moments
        bucket = 2 * min(LARGEST_BUCKET, sum(p.numel() for p in self._trained))  # even, as DeepSpeed wants it
        settings = {
            "train_micro_batch_size_per_gpu": self.config.batch_size
            // (self.accelerator.num_processes * config.accumulate),
            "gradient_accumulation_steps": config.accumulate,
            "gradient_clipping": config.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 2, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
        }
        scalars = {name: p for name, p in bare.named_parameters() if p.ndim == 0}
        for name, p in scalars.items():  # DeepSpeed sends tensors as bytes, and a scalar cannot be seen as bytes
            if p.requires_grad:
                raise InputError("train.sharding", "zero2", f"DeepSpeed trains no scalars, as {name} is one; set fsdp2")
            p.data = p.data.view(1)
        self.objective, self.optimizer, *_ = deepspeed.initialize(
            model=bare, optimizer=optimizer, config=settings, dist_init_required=False
        )
        for p in scalars.values():
            p.data = p.data.view(())
        for state in self._states():
            state["step"].zero_()

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        yield

    def backward(self, loss: Tensor, last: bool) -> None:
        self.objective.set_gradient_accumulation_boundary(last)
        self.objective.backward(loss, scale_wrt_gas=False)

    def update(self) -> Tensor:
        self.objective.step()
        return torch.as_tensor(self.objective.get_global_grad_norm(), device=self.accelerator.device)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        step = self._states()[0]["step"]
        return {
            f"{index}.{key}": step.clone() if key == "step" else safe_get_full_optimizer_state(p, key)
            for index, p in enumerate(self._trained)
            for key in ("step", *_MOMENTS)
        }

    def load(self, checkpoint: Checkpoint, ema: Ema) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._make_moments()
        check_fits(checkpoint.path, self.bare.state_dict(), checkpoint.weights)
        check_fits(checkpoint.path, ema.tensors(), checkpoint.ema)
        self.bare.load_state_dict(checkpoint.weights)
        ema.load(checkpoint.ema)
        for index, p in enumerate(self._trained):
            safe_set_full_fp32_param(p, p.detach().clone())
            for key in _MOMENTS:
                safe_set_full_optimizer_state(p, checkpoint.optimizer[f"{index}.{key}"].to(p.device), key)
        for state in self._states():
            state["step"].copy_(checkpoint.optimizer["0.step"])

    def _make_moments(self) -> None:
        """Moments of zeros, which torch would make in the first step."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero, states = self.optimizer, self.optimizer.optimizer.state
        for group, part in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            for key in _MOMENTS:
                states[part].setdefault(key, torch.zeros_like(part))
            states[part].setdefault("step", torch.zeros((), device=part.device))
            lazy_init_hp_params_optimizer_state(group, part, states)

    def _states(self) -> list[dict[str, Tensor]]:
        """The state of this process's parts."""
        return list(self.optimizer.optimizer.state.values())


def _deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError:
        raise InputError("train.sharding", "zero2", 'needs DeepSpeed: pip install "mmdiff[deepspeed]"') from None
    return deepspeed
