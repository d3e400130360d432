"""The two sides of a comparison: steps of training of mmdiff and of another loop, on the same network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmdiff.backbones import Observation
from mmdiff.build import Experiment, build, build_stand_in
from mmdiff.config import Config, parse_config
from mmdiff.data import StandIn
from mmdiff.errors import InputError
from mmdiff.training.flops import training_flops
from mmdiff.training.process import make_accelerator
from mmdiff.training.trainer import Trainer

Step = Callable[[], None]
SIDE, BATCH = 32, 16


class Pair(NamedTuple):
    """Steps of mmdiff and of the other; ``work``: FLOPs of an mmdiff step over those of the other."""

    mmdiff: Step
    other: Step
    work: float = 1.0


def against_bare(config: Config, hub: bool) -> Pair:
    """A hand-written loop of an ordinary diffusion with the same backbone, AdamW and EMA."""
    return Pair(framework(build(config, hub), config), bare(build(config, hub), config))


def against_anchor(config: Config, hub: bool) -> Pair:
    """The same experiment without its other modalities."""
    alone = anchor_alone(config)
    return Pair(framework(build(config, hub), config), framework(build(alone, hub), alone))


def against_diffusers(config: Config, hub: bool) -> Pair:
    """The loop of diffusers' unconditional example, on a U-Net of 6.5 M parameters; mmdiff has a label beside."""
    config = image_and_label(config)
    return Pair(framework(build_stand_in(config), config), diffusers_loop(build_stand_in(config)))


def muon_against_bare(config: Config, hub: bool) -> Pair:
    """Muon against the bare loop with AdamW, on the same 6.5 M parameters."""
    config = image_and_label(config, optimizer="muon")
    return Pair(framework(build_stand_in(config), config), bare(build_stand_in(config), config))


def against_ddpm(config: Config, hub: bool) -> Pair:
    """denoising-diffusion-pytorch with its own U-Net; images per second at equal FLOPs."""
    try:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    except ImportError:
        remedy = "needs denoising-diffusion-pytorch: pip install 'mmdiff[peers]'"
        raise InputError("--against", "ddpm", remedy) from None
    config = image_and_label(config)
    experiment = build_stand_in(config)
    unet = Unet(dim=64, dim_mults=(1, 2, 4), flash_attn=False)
    diffusion = GaussianDiffusion(unet, image_size=SIDE, objective="pred_v")
    images, times = torch.rand(1, 3, SIDE, SIDE), torch.zeros(1, dtype=torch.int64)
    theirs = training_flops(lambda: unet(images, times))
    channels = sum(m.observation_channels for m in experiment.model.modalities.values())
    context = sum(2 + m.context_width for m in experiment.model.modalities.values())
    seen = Observation(torch.zeros(1, channels, SIDE, SIDE), torch.zeros(1, context))
    ours = training_flops(lambda: experiment.model.backbone(images, times, seen))
    return Pair(framework(experiment, config), _ddpm_loop(diffusion), ours / theirs)


def image_and_label(config: Config, **train: Any) -> Config:
    """Random 32x32 RGB images and labels in batches of 16; steps and threads of ``config``."""
    settings = {"batch_size": BATCH, "steps": config.train.steps, "threads": config.train.threads} | train
    return parse_config(
        {
            "name": "image_and_label",
            "data": {"source": "digits"},
            "modalities": {
                "image": {"kind": "image", "channels": 3, "size": SIDE},
                "label": {"kind": "label", "num_classes": 10, "table_size": 4},
            },
            "backbone": {"kind": "unet", "block_out_channels": [96, 128, 160], "layers_per_block": 1},
            "train": settings,
        }
    )


def anchor_alone(config: Config) -> Config:
    """The experiment without its other modalities."""
    data = config.data.model_copy(update={"masking": {}, "embeddings": {}, "missing": {}, "columns": {}})
    columns = {name: column for name, column in config.data.columns.items() if name == config.anchor}
    modalities = {config.anchor: config.modalities[config.anchor]}
    return config.model_copy(update={"data": data.model_copy(update={"columns": columns}), "modalities": modalities})


def framework(experiment: Experiment, config: Config) -> Callable[[], None]:
    """`Trainer.step`: data, states, encoders, heads, the loss, Accelerate, clipping, EMA."""
    trainer = Trainer(experiment, make_accelerator(config.train))
    batches = trainer.loader(0)

    def step() -> None:
        trainer.step(*next(batches))

    return step


def bare(experiment: Experiment, config: Config) -> Callable[[], None]:
    """The loop one would write by hand for an ordinary diffusion with the same network, AdamW and EMA."""
    backbone, settings = experiment.model.backbone, config.train
    parameters = list(backbone.parameters())
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    if isinstance(experiment.train, StandIn):
        images = experiment.model.modalities[config.anchor].examples(1024, torch.Generator().manual_seed(0))
    else:
        images = experiment.train.all().values[config.anchor]
    signal, sigma = (table.float()[:, None, None, None] for table in experiment.scheduler.path[:2])
    channels = sum(m.observation_channels for m in experiment.model.modalities.values())
    size = settings.batch_size
    observation = Observation(
        torch.zeros(size, channels, *images.shape[2:]),
        torch.zeros(size, sum(2 + m.context_width for m in experiment.model.modalities.values())),
    )

    def step() -> None:
        x = images[torch.randint(len(images), (size,))]
        noise, t = torch.randn_like(x), torch.randint(len(signal), (size,))
        prediction = backbone(signal[t] * x + sigma[t] * noise, t, observation).prediction
        torch.nn.functional.mse_loss(prediction, signal[t] * noise - sigma[t] * x).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - settings.ema_decay)

    return step


class _Images(Dataset):
    """As many random images as a stand-in has rows; the loader of the examples stacks them."""

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(index)) * 2 - 1


def diffusers_loop(experiment: Experiment) -> Step:
    """What examples/unconditional_image_generation of diffusers does in a step, with its default settings."""
    unet = experiment.model.backbone.unet.__class__.from_config(
        {**experiment.model.backbone.unet.config, "in_channels": 3}
    )
    accelerator = make_accelerator(experiment.config.train)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10**6)
    loader = DataLoader(_Images(), batch_size=BATCH, shuffle=True)
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    noise_scheduler, rows = DDPMScheduler(num_train_timesteps=1000), iter(loader)

    def step() -> None:
        clean = next(rows)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),), device=clean.device)
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        with accelerator.accumulate(unet):
            loss = nn.functional.mse_loss(unet(noisy, timesteps).sample.float(), noise.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ema.step(unet.parameters())
        loss.detach().item()

    return step


def _ddpm_loop(diffusion: Any) -> Step:
    """What its `Trainer` does in a step: Adam, clipping, ema_pytorch every tenth step."""
    from ema_pytorch import EMA

    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema, rows = EMA(diffusion, beta=0.995, update_every=10), iter(DataLoader(_Images(), batch_size=BATCH, shuffle=True))

    def step() -> None:
        loss = diffusion((next(rows) + 1) / 2)
        loss.backward()
        loss.item()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return step


TRAINING: dict[str, Callable[[Config, bool], Pair]] = {
    "bare": against_bare,
    "anchor": against_anchor,
    "diffusers": against_diffusers,
    "muon": muon_against_bare,
    "ddpm": against_ddpm,
}
