"""The measurements of `mmdiff benchmark gpu`; each returns plain numbers and texts."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from mmdiff.benchmarks.gpu.cases import Network, Size, Tree, tree_of
from mmdiff.build import build_stand_in
from mmdiff.config import parse_config
from mmdiff.data import Batch
from mmdiff.errors import TrainingError
from mmdiff.objective import BatchPosition
from mmdiff.sampling.request import request_of
from mmdiff.sampling.reverse_step import ReverseStep
from mmdiff.training import train
from mmdiff.training.flops import now, training_flops
from mmdiff.training.process import make_accelerator
from mmdiff.training.trainer import Trainer

PRECISIONS = ("bf16", "tf32", "fp32")
WARM_UP = 3  # steps
Facts = dict[str, Any]


def set_precision(precision: str) -> None:
    """float32 products in TF32 or not."""
    fast = precision == "tf32"
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cudnn.allow_tf32 = fast


class Training:
    """A trainer and one batch on its device: steps without the reading of data.

    Args:
        network: in an experiment of image and label.
        precision: one of `PRECISIONS`.
        batch: images per step.
        compiler: the backend that compiles the backbone's blocks, or None.
    """

    def __init__(self, network: Network, precision: str, batch: int, compiler: str | None = None) -> None:
        set_precision(precision)
        config = parse_config(tree_of(network, batch, precision))
        experiment = build_stand_in(config)
        if network.channels == 4:
            experiment.model.modalities["image"].attach(_autoencoder())
        self.trainer = Trainer(experiment, make_accelerator(config.train))
        self.device, self.size, self.done = self.trainer.accelerator.device, batch, 0
        generator = torch.Generator().manual_seed(0)
        values = {n: m.examples(batch, generator) for n, m in experiment.model.modalities.items()}
        present = {name: torch.ones(batch, dtype=torch.bool) for name in values}
        if network.channels == 4:
            stored = torch.randn(batch, 8, network.side, network.side, generator=generator)  # mean, log-variance
            values["image/latents"] = stored
        self.batch = Batch(values, present | {n: torch.ones(batch, dtype=torch.bool) for n in values}).to(self.device)
        self.flops = batch * training_flops(self._forward_one)
        if compiler:
            experiment.model.backbone.compile_blocks(compiler)

    def _forward_one(self) -> None:
        one = Batch({n: v[:1] for n, v in self.batch.values.items()}, {n: p[:1] for n, p in self.batch.present.items()})
        self.trainer.bare(one, BatchPosition(0, torch.zeros(1, dtype=torch.int64, device=self.device), 1))

    def step(self) -> Tensor:
        """One optimizer step; the loss, on the device."""
        terms = self.trainer.step(self.done, [(range(self.size), [self.batch])])
        self.done += 1
        return terms["loss"]


def _autoencoder() -> AutoencoderKL:
    """Latents are stored: of the autoencoder only the scale is read."""
    return AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=8)


def throughput(size: Size, name: str, precision: str, compiled: bool, peaks: dict[str, float]) -> Facts:
    """Images per second of a training step, its share of the matrix peak, and memory.

    The batch is halved where memory runs out.
    """
    network, batch = size.networks[name], size.networks[name].batch
    while True:
        try:
            return _throughput(size, network, batch, precision, compiled, peaks)
        except torch.OutOfMemoryError:
            batch //= 2
            if batch == 0:
                raise
        clean()


def _throughput(
    size: Size, network: Network, batch: int, precision: str, compiled: bool, peaks: dict[str, float]
) -> Facts:
    training = Training(network, precision, batch, size.compiler if compiled else None)
    device = training.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = now(device)
    for _ in range(WARM_UP):
        training.step()
    warm = now(device) - started
    started, steps, seconds = now(device), 0, 0.0
    while seconds < size.seconds:
        for _ in range(WARM_UP):
            training.step()
        steps, seconds = steps + WARM_UP, now(device) - started
    images = batch * steps / seconds
    return {
        "batch": batch,
        "parameters": sum(p.numel() for p in training.trainer.bare.model.backbone.parameters()),
        "images_per_second": images,
        "mfu": images / batch * training.flops / peaks[precision] if precision in peaks else None,
        "gflops_per_image": training.flops / batch / 1e9,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "warm_up_seconds": warm,
    }


def losses(size: Size, name: str) -> Facts:
    """The losses of the same steps in bf16 and in fp32."""
    rows = {}
    for precision in ("fp32", "bf16"):
        training = Training(size.networks[name], precision, max(2, size.networks[name].batch // 4))
        rows[precision] = torch.stack([training.step() for _ in range(size.loss_steps)]).tolist()
        del training
        clean()
    apart = [abs(a - b) / abs(a) for a, b in zip(rows["fp32"], rows["bf16"], strict=True)]
    return {**rows, "largest_relative_difference": max(apart)}


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Within the block an operation that makes the host wait for the accelerator raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waiting(size: Size, name: str) -> Facts:
    """Steps of training and of sampling, in which the host may not wait for the accelerator."""
    training = Training(size.networks[name], "bf16", max(2, size.networks[name].batch // 4))
    for _ in range(WARM_UP):
        training.step()
    with no_waiting(training.device):
        for _ in range(WARM_UP):
            training.step()
    _denoise(training, 4, {})  # fills the caches
    with torch.no_grad():
        _denoise(training, 4, {}, no_waiting)
    return {"training": "none", "sampling": "none", "checked": training.device.type == "cuda"}


def _denoise(
    training: Training, steps: int, observed: dict[str, Tensor], guard: Callable[..., Any] | None = None
) -> Tensor:
    """The loop of a call to the pipeline alone."""
    pipeline = training.trainer.pipeline()
    parameters = inspect.signature(type(pipeline).__call__).parameters
    given = {"batch_size": training.size, "observed": observed, "num_inference_steps": steps}
    arguments = {name: parameter.default for name, parameter in parameters.items()} | given
    step = ReverseStep(pipeline.model, pipeline.scheduler, request_of(pipeline.model, pipeline.scheduler, arguments))
    z_t = step.start()
    with torch.no_grad(), guard(training.device) if guard else contextlib.nullcontext():
        for index, back in step.schedule:
            z_t = step(z_t, index, back)
    return z_t


def latency(size: Size, name: str) -> Facts:
    """Milliseconds of a sampling step at a batch, joint and given the label."""
    training = Training(size.networks[name], "bf16", max(2, size.networks[name].batch // 4))
    facts: Facts = {"batch": training.size}
    for title, observed in (("joint", {}), ("given_label", {"label": training.batch.values["label"]})):
        _denoise(training, 4, observed)
        seconds = []
        for steps in (10, 20):
            started = now(training.device)
            _denoise(training, steps, observed)
            seconds.append(now(training.device) - started)
        facts[f"{title}_ms_per_step"] = 100 * (seconds[1] - seconds[0])
    return facts


def real_training(size: Size, out: Path) -> Facts:
    """A training on procedural shapes, made on the spot, with its curve."""
    tree = size.training | {"name": "training", "output": str(out / "training")}
    tree["train"] = tree["train"] | {"steps": size.steps, "mixed_precision": "bf16"}
    started = time.perf_counter()
    folder = train(parse_config(tree), progress=False)
    lines = [yaml.safe_load(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    return {
        "steps": size.steps,
        "seconds": time.perf_counter() - started,
        "images_per_second": last["images_per_second"],
        "first_loss": first["loss"],
        "last_loss": last["loss"],
        "curve": "training/curves.png",
    }


def resume(size: Size, out: Path) -> Facts:
    """A run that is killed and goes on, against one that is not: how many weights differ."""
    tree = size.training | {"name": "resume"}
    every = max(1, size.resume_steps // 4)
    tree["train"] = tree["train"] | {"steps": size.resume_steps, "checkpoint_every": every, "resume": "auto"}
    killed, whole = out / "killed", out / "whole"
    file = out / "killed.yaml"
    file.write_text(yaml.safe_dump(tree | {"output": str(killed)}))
    command = [sys.executable, "-m", "mmdiff", "train", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    while not list((killed / "checkpoints").glob("step-*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = max((int(p.name[5:]) for p in (killed / "checkpoints").glob("step-*")), default=0)
    weights = []
    for folder in (killed, whole):
        train(_parsed(tree, folder), progress=False)
        weights.append(load_file(folder / "pipeline" / "model" / "diffusion_pytorch_model.safetensors"))
    if weights[0].keys() != weights[1].keys():
        raise TrainingError("the two runs have other tensors")
    differing = sum(int((weights[0][name] != weights[1][name]).sum()) for name in weights[0])
    return {"killed_after_step": stopped, "steps": size.resume_steps, "differing_weights": differing}


def _parsed(tree: Tree, folder: Path) -> Any:
    return parse_config(tree | {"output": str(folder)})


def clean() -> None:
    """Give back what a part held."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
