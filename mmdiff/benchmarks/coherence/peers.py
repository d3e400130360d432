"""Multimodal variational autoencoders of the package multivae (Senellart et al., 2023), on the rows that mmdiff sees.

Settings of MMVAE+ and MVTCAE are those with which its authors reproduce the papers on PolyMNIST; the others have the
same by analogy. The networks are theirs for it, too, but for images of any size: three convolutions of stride 2.
Images are in [0, 1] with Laplace decoders of scale 0.75, and Adam (AMSGrad) learns at 1e-3.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmdiff.benchmarks.coherence.scores import Images
from mmdiff.benchmarks.coherence.sides import Budget, Task
from mmdiff.errors import InputError
from mmdiff.randomness import fold
from mmdiff.training.process import set_threads

LEARNING_RATE = 1e-3
_DRAWN = 64  # rows at once; MMVAE+ and CMVAE draw one of the given modalities for each batch
_WIDTHS = (32, 64, 128)


class Peer(NamedTuple):
    """A model of multivae: its class, settings beside those of all, the width of private latents (0: none), and
    whether it needs rows in which nothing is missing."""

    model: str
    settings: dict[str, Any]
    private: int = 0
    whole_rows: bool = False


_PRIVATE = {"latent_dim": 32, "modalities_specific_dim": 32, "K": 1, "beta": 2.5}
PEERS: dict[str, Peer] = {
    "MMVAE+": Peer("MMVAEPlus", _PRIVATE, private=32),  # Palumbo et al., 2023
    "CMVAE": Peer("CMVAE", _PRIVATE, private=32),  # Palumbo et al., 2024
    "MVTCAE": Peer("MVTCAE", {"latent_dim": 512, "beta": 2.5, "alpha": 5 / 6}),  # Hwang et al., 2021
    "MoPoE": Peer("MoPoE", {"latent_dim": 512, "beta": 2.5}),  # Sutter et al., 2021
    "JMVAE": Peer("JMVAE", {"latent_dim": 512, "beta": 2.5, "alpha": 0.1}, whole_rows=True),  # Suzuki et al., 2016
}


def installed() -> bool:
    """Whether multivae is there."""
    return find_spec("multivae") is not None


class Autoencoder:
    """A trained peer.

    Args:
        model: of multivae.
        facts: for the table.
        shapes: {modality: (C, H, W)}.
    """

    def __init__(self, model: nn.Module, facts: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        self.model, self.facts, self.shapes = model.eval(), facts, shapes

    def joint(self, count: int, seed: int) -> Images:
        def drawn(size: int) -> Any:  # it drops the batch of one
            return self.model.decode(self.model.generate_from_prior(max(2, size)))

        sizes = [min(_DRAWN, count - start) for start in range(0, count, _DRAWN)]
        return self._joined([partial(drawn, size) for size in sizes], sizes, list(self.shapes), seed)

    def rest(self, given: Images, seed: int) -> Images:
        from multivae.data.datasets.base import MultimodalBaseDataset

        wanted = [name for name in self.shapes if name not in given]

        def drawn(rows: slice) -> Any:
            data = {name: (values[rows] + 1) / 2 for name, values in given.items()}
            size = rows.stop - rows.start  # some models encode all, and use what is given
            data |= {name: torch.zeros(size, *self.shapes[name]) for name in wanted}
            return self.model.predict(MultimodalBaseDataset(data), cond_mod=list(given), gen_mod=wanted)

        count = len(next(iter(given.values())))
        parts = [slice(start, min(start + _DRAWN, count)) for start in range(0, count, _DRAWN)]
        return self._joined(
            [partial(drawn, part) for part in parts], [part.stop - part.start for part in parts], wanted, seed
        )

    @torch.no_grad()
    def _joined(self, draws: list[Callable[[], Any]], sizes: list[int], names: list[str], seed: int) -> Images:
        """Images in [−1, 1]; grey where a model that diverged gives none."""
        outputs = []
        with _seeded(seed):
            for draw, size in zip(draws, sizes):
                output = {} if self.facts["diverged"] else draw()
                grey = {name: torch.full((size, *self.shapes[name]), 0.5) for name in names}
                outputs.append({name: output.get(name, grey[name]).reshape(-1, *self.shapes[name]) for name in names})
        images = {
            name: torch.cat([output[name][:size] for output, size in zip(outputs, sizes)]).nan_to_num(0.5)
            for name in names
        }
        return {name: 2 * values.clamp(0, 1) - 1 for name, values in images.items()}


def train_peer(name: str, task: Task, budget: Budget) -> Autoencoder:
    """See `mmdiff.benchmarks.coherence.sides.Side`; ``name`` is a key of `PEERS`."""
    from pythae.data.datasets import DatasetOutput

    logging.getLogger("multivae").setLevel(logging.WARNING)
    set_threads(task.config.train.threads)
    peer, shapes = PEERS[name], _shapes(task)
    rows = _rows(task, peer.whole_rows)
    batch_size, rate = min(task.config.train.batch_size, len(rows)), budget.factor * LEARNING_RATE
    with _seeded(fold(budget.seed, 0, f"coherence/{name}")):
        model = _build(peer, shapes).train()
        optimizer = torch.optim.Adam(model.parameters(), rate, amsgrad=True)
        started, count, diverged = time.process_time(), 0, False
        for places in _batches(rows, batch_size):
            batch = task.table.batch(places.tolist())
            data = {one: (batch.values[one] + 1) / 2 for one in shapes}
            missing = not all(bool(batch.present[one].all()) for one in shapes)
            masks = {"masks": {one: batch.present[one] for one in shapes}} if missing else {}
            data = {one: values * _as(batch.present[one], values) for one, values in data.items()}
            optimizer.zero_grad()
            loss = _loss(model, DatasetOutput(data=data, **masks), 1 + count * batch_size // len(rows))
            if diverged := loss is None:
                break
            loss.backward()
            optimizer.step()
            count += 1
            if time.process_time() - started >= budget.seconds:
                break
    facts = {"steps": count, "CPU seconds": time.process_time() - started, "learning rate": rate, "diverged": diverged}
    facts |= {"parameters": sum(p.numel() for p in model.parameters()), "batch size": batch_size, "rows": len(rows)}
    return Autoencoder(model, facts, shapes)


def _loss(model: nn.Module, inputs: Any, epoch: int) -> Tensor | None:
    """None where the model has diverged, which multivae finds by assertions and checks of arguments."""
    try:
        loss = model(inputs, epoch=epoch).loss
    except (AssertionError, ValueError):
        return None
    return loss if bool(loss.isfinite()) else None


def _as(present: Tensor, values: Tensor) -> Tensor:
    return present.reshape(-1, *(1,) * (values.ndim - 1)).to(values)


def _shapes(task: Task) -> dict[str, tuple[int, ...]]:
    values = task.table.batch([0]).values
    return {name: tuple(values[name].shape[1:]) for name in task.names}


def _rows(task: Task, whole: bool) -> Tensor:
    """The rows to train on: those with an image, or those with all of them."""
    chosen = []
    for part in torch.arange(len(task.table)).split(1024):
        present = task.table.batch(part.tolist()).present
        there = torch.stack([present[name] for name in task.names])
        chosen.append(part[there.all(0) if whole else there.any(0)])
    rows = torch.cat(chosen)
    if len(rows) < 2:
        raise InputError("--missing", len(rows), "rows have all images; too few for a peer that needs whole rows")
    return rows


def _batches(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Without end, each epoch in another order."""
    while True:
        for places in rows[torch.randperm(len(rows))].split(size):
            if len(places) == size:
                yield places


class _seeded:
    """Global generators of torch and numpy, from which multivae draws, seeded within and as they were after."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self._states = torch.get_rng_state(), np.random.get_state()
        torch.manual_seed(self.seed)
        np.random.seed(self.seed % 2**32)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self._states[0])
        np.random.set_state(self._states[1])


# ------------------------------------------------------------------------------------------------------------ networks


def _build(peer: Peer, shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    from multivae import models

    settings = {
        "n_modalities": len(shapes),
        "input_dims": shapes,
        "decoders_dist": dict.fromkeys(shapes, "laplace"),
        "decoder_dist_params": {name: {"scale": 0.75} for name in shapes},
        **peer.settings,
    }
    config = getattr(models, f"{peer.model}Config")(**settings)
    latent = peer.settings["latent_dim"]
    encoders = {name: _encoder(shape, latent, peer.private) for name, shape in shapes.items()}
    decoders = {name: _decoder(shape, latent + peer.private) for name, shape in shapes.items()}
    return getattr(models, peer.model)(config, encoders=encoders, decoders=decoders)


def _sides(length: int) -> list[int]:
    """Of the maps: the image's, then after each convolution."""
    return [length, *(length := math.ceil(length / 2) for _ in _WIDTHS)]


def _encoder(shape: tuple[int, ...], latent: int, private: int) -> nn.Module:
    from multivae.models.base import BaseEncoder, ModelOutput

    class Encoder(BaseEncoder):
        """Of the shared latents, and by convolutions of their own of the private ones."""

        def __init__(self) -> None:
            super().__init__()
            self.latent_dim = latent
            parts = {"": latent} | ({"style_": private} if private else {})
            self.parts = nn.ModuleDict({f"part_{key}": _convolutions(shape, width) for key, width in parts.items()})

        def forward(self, images: Tensor) -> Any:
            output = ModelOutput()
            for key, part in self.parts.items():
                prefix = key.removeprefix("part_")
                mean, log_variance = part(images).chunk(2, dim=1)
                output[f"{prefix}embedding"] = mean
                output[f"{prefix}log_covariance"] = log_variance.clone()  # some models write into it
            return output

    return Encoder()


def _convolutions(shape: tuple[int, ...], latent: int) -> nn.Sequential:
    """(n, C, H, W) -> (n, 2 · latent): means, then log-variances."""
    channels = (shape[0], *_WIDTHS)
    layers = [
        layer
        for one, other in zip(channels[:-1], channels[1:])
        for layer in (nn.Conv2d(one, other, 3, stride=2, padding=1), nn.ReLU())
    ]
    flat = _WIDTHS[-1] * _sides(shape[1])[-1] * _sides(shape[2])[-1]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, latent), nn.ReLU(), nn.Linear(latent, 2 * latent))


def _decoder(shape: tuple[int, ...], latent: int) -> nn.Module:
    from multivae.models.base import BaseDecoder, ModelOutput

    heights, widths = _sides(shape[1])[::-1], _sides(shape[2])[::-1]

    class Decoder(BaseDecoder):
        """(…, latent) -> (…, C, H, W)."""

        def __init__(self) -> None:
            super().__init__()
            channels = (*_WIDTHS[::-1], shape[0])
            layers: list[nn.Module] = [nn.Linear(latent, channels[0] * heights[0] * widths[0])]
            layers += [nn.ReLU(), nn.Unflatten(1, (channels[0], heights[0], widths[0]))]
            for index, (one, other) in enumerate(zip(channels[:-1], channels[1:])):
                odd = [1 - sides[index + 1] % 2 for sides in (heights, widths)]
                layers += [nn.ConvTranspose2d(one, other, 3, stride=2, padding=1, output_padding=odd), nn.ReLU()]
            self.layers = nn.Sequential(*layers[:-1])

        def forward(self, latents: Tensor) -> Any:
            images = self.layers(latents.reshape(-1, latents.shape[-1]))
            return ModelOutput(reconstruction=images.reshape(*latents.shape[:-1], *images.shape[1:]))

    return Decoder()
