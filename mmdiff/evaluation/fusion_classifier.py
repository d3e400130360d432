"""The fusion benchmark by classifiers: an encoder, a fusion of what it makes of each photo, and a linear layer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmdiff.evaluation.fusion_bags import Photos, one_large
from mmdiff.evaluation.fusion_learning import BEST, FINE_TUNED, SINGLE, ZERO_SHOT, Answers, Cell, Way, fit
from mmdiff.evaluation.fusion_settings import Settings
from mmdiff.modalities.encoders import build_encoder
from mmdiff.modalities.fusion import FUSIONS, Fused, Fusion, build_fusion

_CHUNK = 256


class Classifier(nn.Module):
    """Images (N, 3, h, w) uint8 -> features (N, d); fused features (B, d) -> logits (B, classes)."""

    def __init__(self, encoder: dict, size: int, classes: int) -> None:
        super().__init__()
        self.encoder = build_encoder(encoder, 3, (size, size))
        self.head = nn.Linear(self.encoder.width, classes)

    def features(self, images: Tensor) -> Tensor:
        """In chunks where nothing is learned."""
        if torch.is_grad_enabled():
            return self.encoder(images.float() / 127.5 - 1)
        return torch.cat([self.encoder(part.float() / 127.5 - 1) for part in images.split(_CHUNK)])


class Sets:
    """``images`` (N, 3, h, w) uint8 of all sets, ``mask`` (B, n), ``places`` (B, n) of each photo in ``images``."""

    def __init__(self, photos: list[Photos]) -> None:
        counts = torch.tensor([len(members) for members in photos])
        self.images = torch.stack([_pixels(photo) for members in photos for photo in members])
        self.mask = torch.arange(int(counts.max())) < counts[:, None]
        self.places = torch.zeros_like(self.mask, dtype=torch.long).masked_scatter(
            self.mask, torch.arange(len(self.images))
        )

    def fuse(self, fusion: Fusion, features: Tensor, rows: Tensor) -> Fused:
        """Features (N, d) of all photos -> those of some sets, fused."""
        return fusion(features[self.places[rows]], self.mask[rows])

    def encode_and_fuse(self, model: Classifier, fusion: Fusion, rows: Tensor) -> Fused:
        """The same with an encoder that learns."""
        mask = self.mask[rows]
        found = model.features(self.images[self.places[rows][mask]])  # (members, d)
        return fusion(found.new_zeros(*mask.shape, found.shape[1]).masked_scatter(mask[..., None], found), mask)


class Classifiers(Way):
    """Pretrained on single photos for each seed; then the encoder is frozen, and fusion and linear layer learn on bags.

    One large image is fine-tuned with the encoder, as there is nothing else to learn.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        super().__init__(settings, folder)
        self._seen: tuple[int, dict[Cell | None, Tensor]] = (-1, {})  # of one seed

    def answers(self, entry: str, seed: int) -> Iterable[tuple[Cell, dict[str, Answers]]]:
        model, fusion = self._pretrained(seed), None
        if entry in FUSIONS:
            fusion = self._fused(model, entry, seed)
        elif entry == FINE_TUNED:
            self._tune_on_large(model, seed)
        ((task, _),) = self.settings.tasks.items()
        with torch.no_grad():
            for cell in self.cells:
                found = self._by_fusion(model, fusion, cell, seed) if fusion else self._by_image(model, entry, cell)
                yield cell, {task: found}

    @cached_property
    def _classes(self) -> list[str]:
        ((_, answers),) = self.bags.answers.items()
        return sorted(set(answers))

    def _targets(self, answers: dict[str, list[str]]) -> Tensor:
        ((_, texts),) = answers.items()
        return torch.tensor([self._classes.index(text) for text in texts])

    @cached_property
    def _sets(self) -> dict[Cell | None, Sets]:
        """The training bags (None), and those of each cell."""
        return {None: Sets(self.bags.photos), **{cell: Sets(self.test(cell).photos) for cell in self.cells}}

    def _features(self, model: Classifier, cell: Cell | None, seed: int) -> Tensor:
        """What the frozen encoder of a seed makes of all photos (N, d): all fusions see the same."""
        if self._seen[0] != seed:
            self._seen = (seed, {})
        if cell not in self._seen[1]:
            with torch.no_grad():
                self._seen[1][cell] = model.features(self._sets[cell].images)
        return self._seen[1][cell]

    # ------------------------------------------------------------------------------------------------------- learning

    def _pretrained(self, seed: int) -> Classifier:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Classifier(self.settings.encoder, self.settings.data.size, len(self._classes))
        model.encoder.load_initial_weights()
        path = self.folder / f"classifier-{seed}.safetensors"
        if not path.is_file():
            images, targets = Sets(self.single.photos).images, self._targets(self.single.answers)

            def loss(rows: Tensor) -> Tensor:
                return cross_entropy(model.head(model.features(images[rows])), targets[rows])

            fit(model.parameters(), loss, len(targets), self.settings.pretraining, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_model(model, str(path.with_suffix(".partial")))
            path.with_suffix(".partial").replace(path)
        load_model(model, str(path))
        return model.eval()

    def _fused(self, model: Classifier, kind: str, seed: int) -> Fusion:
        sets, targets = self._sets[None], self._targets(self.bags.answers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fusion = build_fusion(kind, model.encoder.width, self.settings.hidden)
        learned = [*fusion.parameters(), *model.head.parameters()]
        if self.settings.encoder_learns:

            def fuse(rows: Tensor) -> Fused:
                return sets.encode_and_fuse(model, fusion, rows)

            learned += model.encoder.parameters()
        else:
            features = self._features(model, None, seed)

            def fuse(rows: Tensor) -> Fused:
                return sets.fuse(fusion, features, rows)

        def loss(rows: Tensor) -> Tensor:
            return cross_entropy(model.head(fuse(rows).embedding), targets[rows])

        fit(learned, loss, len(targets), self.settings.training, seed)
        return fusion

    @cached_property
    def _large(self) -> list[Tensor]:
        """The training bags as one large image each, of several sizes."""
        return [_pixels(one_large(photos)) for photos in self.bags.photos]

    def _tune_on_large(self, model: Classifier, seed: int) -> None:
        targets = self._targets(self.bags.answers)

        def loss(rows: Tensor) -> Tensor:
            groups: dict[int, list[int]] = {}
            for row in rows.tolist():
                groups.setdefault(self._large[row].shape[-1], []).append(row)
            parts = [
                cross_entropy(
                    model.head(model.features(torch.stack([self._large[row] for row in group]))),
                    targets[group],
                    reduction="sum",
                )
                for group in groups.values()
            ]
            return torch.stack(parts).sum() / len(rows)

        fit(model.parameters(), loss, len(targets), self.settings.training, seed)

    # ------------------------------------------------------------------------------------------------------ answering

    def _by_fusion(self, model: Classifier, fusion: Fusion, cell: Cell, seed: int) -> Answers:
        sets, learned = self._sets[cell], self.settings.encoder_learns
        features = model.features(sets.images) if learned else self._features(model, cell, seed)
        fused = sets.fuse(fusion, features, torch.arange(len(sets.mask)))
        return Answers([[text] for text in self._named(model, fused.embedding)], fused.weights)

    def _by_image(self, model: Classifier, entry: str, cell: Cell) -> Answers:
        """What single images say: the large one of all photos, the first, or each."""
        photos = self.test(cell).photos
        seen = {
            ZERO_SHOT: lambda members: [one_large(members)],
            FINE_TUNED: lambda members: [one_large(members)],
            SINGLE: lambda members: members[:1],
            BEST: lambda members: members,
        }[entry]
        chosen = [seen(members) for members in photos]
        by_side: dict[int, list[tuple[int, Tensor]]] = {}
        for row, members in enumerate(chosen):
            for photo in members:
                by_side.setdefault(photo.width, []).append((row, _pixels(photo)))
        texts: list[list[str]] = [[] for _ in photos]
        for group in by_side.values():
            features = model.features(torch.stack([pixels for _, pixels in group]))
            for (row, _), text in zip(group, self._named(model, features)):
                texts[row].append(text)
        return Answers(texts)

    def _named(self, model: Classifier, features: Tensor) -> list[str]:
        return [self._classes[index] for index in model.head(features).argmax(dim=1).tolist()]


def _pixels(photo: object) -> Tensor:
    """(3, h, w) uint8."""
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1).contiguous()
