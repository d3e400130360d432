"""What is measured: networks, batches and numbers of steps, at the size of an accelerator and at toy size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Tree = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """One backbone.

    Attributes:
        settings: of the backbone.
        channels, side: of the diffusion space; four channels are latents, which come as they are stored.
        batch: images per step; halved where memory runs out.
    """

    settings: Mapping[str, Any]
    channels: int
    side: int
    batch: int


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        networks: by name.
        compiled: those that are compiled, too.
        compiler: the backend of `torch.compile`.
        seconds: of measured steps per row.
        loss_steps: of the comparison of bf16 with fp32.
        training: settings of the run on procedural shapes, as a tree.
        steps: of that run.
        resume_steps: of the run that is killed and goes on.
    """

    networks: Mapping[str, Network]
    compiled: tuple[str, ...]
    compiler: str
    seconds: float
    loss_steps: int
    training: Tree
    steps: int
    resume_steps: int


def _shapes(channels: list[int], rows: int, batch: int, **backbone: Any) -> Tree:
    """Image, mask, label and embedding of procedural shapes, rendered when they are first read."""
    return {
        "data": {"source": "shapes", "options": {"rows": rows, "validation_rows": 64, "size": 32}},
        "modalities": {
            "image": {"kind": "image"},
            "label": {"kind": "label", "table_size": 4},
            "mask": {"kind": "mask"},
            "embedding": {"kind": "embedding", "map_size": 4},
        },
        "backbone": {"kind": "unet", "block_out_channels": channels, "layers_per_block": 1, "patch_size": 2} | backbone,
        "train": {"batch_size": batch, "learning_rate": 1e-3, "log_every": 10},
        "sample": {"steps": 10},
        "evaluate": {"at_end": False},
    }


#: The published sizes: ADM of ImageNet-64 (Dhariwal and Nichol, 2021), DiT-B (Peebles and Xie, 2023).
REAL = Size(
    networks={
        "DiT-B/2": Network({"kind": "dit", "preset": "B", "patch_size": 2}, 4, 32, 256),
        "DiT-B/1": Network({"kind": "dit", "preset": "B", "patch_size": 1}, 4, 16, 256),
        "U-Net ADM-64": Network(
            {
                "kind": "unet",
                "block_out_channels": [192, 384, 576, 768],
                "layers_per_block": 3,
                "attention": [False, True, True, True],
                "attention_head_dim": 64,
                "norm_num_groups": 32,
                "time_scale_shift": "scale_shift",
            },
            3,
            64,
            64,
        ),
    },
    compiled=("DiT-B/2", "DiT-B/1", "U-Net ADM-64"),
    compiler="inductor",
    seconds=3.0,
    loss_steps=20,
    training=_shapes([128, 256, 256], 4096, 128),
    steps=300,
    resume_steps=40,
)
TOY = Size(
    networks={
        "DiT": Network({"kind": "dit", "depth": 4, "width": 32, "heads": 2, "patch_size": 4}, 4, 16, 4),
        "U-Net": Network(
            {"kind": "unet", "block_out_channels": [8, 16], "layers_per_block": 1, "attention_head_dim": 8}, 3, 16, 4
        ),
    },
    compiled=("DiT",),
    compiler="eager",
    seconds=0.05,
    loss_steps=2,
    training=_shapes([8, 16], 32, 4, attention_head_dim=8),
    steps=4,
    resume_steps=4,
)


def tree_of(network: Network, batch: int, precision: str) -> Tree:
    """The experiment of an image and its class label around a network, without data."""
    latent = {"space": "latent", "autoencoder": "stored", "latent_channels": network.channels, "latent_factor": 1}
    image = {"kind": "image", "channels": 3, "size": network.side} | (latent if network.channels == 4 else {})
    return {
        "name": "gpu",
        "data": {"source": "digits"},
        "modalities": {
            "image": image,
            "label": {"kind": "label", "num_classes": 1000, "observe_as": "context", "weight": {"schedule": "none"}},
        },
        "backbone": dict(network.settings),
        "train": {
            "batch_size": batch,
            "steps": 10**6,
            "learning_rate": 1e-4,
            "mixed_precision": "bf16" if precision == "bf16" else "no",
        },
    }
