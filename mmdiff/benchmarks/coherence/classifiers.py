"""Who judges: one small classifier per modality, trained on real rows; its own accuracy is always told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdiff.benchmarks.cache import stored
from mmdiff.randomness import fold

EPOCHS, BATCH, LEARNING_RATE = 8, 64, 2e-3
_READ = 256  # images at once


class Classifier(nn.Module):
    """Three convolutions and a linear layer: images (n, C, H, W) in [−1, 1] -> log-probabilities (n, classes)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = (channels, 32, 64, 64)
        blocks = [_block(one, other) for one, other in zip(widths[:-1], widths[1:])]
        self.layers = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).log_softmax(dim=1)

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """The same of many images, without gradients."""
        return torch.cat([self.eval()(part) for part in images.split(_READ)])


def _block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)
    )


def classifiers(images: Mapping[str, Tensor], labels: Tensor, classes: int, path: Path) -> dict[str, Classifier]:
    """{modality: its classifier}, from the file where they are, else trained and kept there.

    Args:
        images: {modality: (n, C, H, W)} of real training rows.
        labels: (n,).
        classes: how many.
        path: of the weights.
    """
    made = {name: Classifier(values.shape[1], classes) for name, values in images.items()}

    def write(partial: Path) -> None:
        for name, values in images.items():
            _train(made[name], values, labels, name)
        state = {f"{name}/{key}": t for name, one in made.items() for key, t in one.state_dict().items()}
        save_file(state, partial)

    weights = load_file(stored(path, write))
    for name, one in made.items():
        own = {key.removeprefix(f"{name}/"): t for key, t in weights.items() if key.startswith(f"{name}/")}
        one.load_state_dict(own)
    return made


def _train(classifier: Classifier, images: Tensor, labels: Tensor, name: str) -> None:
    """AdamW with one cycle of the learning rate; a function of the data and the name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(0, 0, f"coherence/classifier/{name}"))
        classifier.apply(lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else None)
        orders = [torch.randperm(len(images)).split(BATCH) for _ in range(EPOCHS)]
    batches = [rows for order in orders for rows in order if len(rows) > 1]  # batch norm needs two
    optimizer = torch.optim.AdamW(classifier.parameters(), LEARNING_RATE)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=len(batches) + 1)
    for rows in batches:
        optimizer.zero_grad()
        nn.functional.nll_loss(classifier.train()(images[rows]), labels[rows]).backward()
        optimizer.step()
        cycle.step()
