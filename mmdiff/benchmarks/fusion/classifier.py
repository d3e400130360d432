"""The fusion benchmark by classifiers: an encoder, a fusion of what it makes of each photo, and a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from mmdiff.benchmarks.cache import stored
from mmdiff.benchmarks.fusion.entries import ASKED, BEST, FINE_TUNED, FUSED, SINGLE, ZERO_SHOT
from mmdiff.benchmarks.fusion.image_sets import front_views
from mmdiff.benchmarks.fusion.learning import Answers, Cell, CellAnswers, Learner, fit
from mmdiff.benchmarks.fusion.photos import Photos, one_large, square
from mmdiff.benchmarks.fusion.settings import Settings
from mmdiff.errors import InputError
from mmdiff.modalities.encoders import build_encoder
from mmdiff.modalities.fusion import Fused, Fusion, build_fusion

_CHUNK = 256
Which = tuple[Cell | None, bool]  # the training sets (None) or those of a cell, with distractors or without


class Classifier(nn.Module):
    """Images (N, 3, h, w) uint8 -> features (N, d); fused features (B, d), and where the head knows the questions one
    of ``questions`` (B, questions) -> logits (B, classes)."""

    def __init__(self, encoder: dict, size: int, classes: int, questions: int = 0) -> None:
        super().__init__()
        self.encoder = build_encoder(encoder, 3, (size, size))
        self.told = questions > 0
        self.head = (
            _told_head(self.encoder.width, questions, classes) if self.told else nn.Linear(self.encoder.width, classes)
        )

    def answer(self, features: Tensor, query: Tensor) -> Tensor:
        return self.head(torch.cat([features, query], dim=1) if self.told else features)

    def features(self, images: Tensor) -> Tensor:
        """In chunks where nothing is learned."""
        if torch.is_grad_enabled():
            return self.encoder(images.float() / 127.5 - 1)
        return torch.cat([self.encoder(part.float() / 127.5 - 1) for part in images.split(_CHUNK)])


def _told_head(width: int, questions: int, classes: int) -> nn.Module:
    """Two layers: one cannot look up in the features what a question asks for."""
    return nn.Sequential(nn.Linear(width + questions, 2 * width), nn.GELU(), nn.Linear(2 * width, classes))


class Sets:
    """``images`` (N, 3, h, w) uint8 of all sets, ``mask`` (B, n), ``places`` (B, n) of each photo in ``images``, and
    ``queries`` (B, q) of the questions."""

    def __init__(self, photos: list[Photos], queries: Tensor) -> None:
        self.queries = queries
        counts = torch.tensor([len(members) for members in photos])
        self.images = torch.stack([_pixels(photo) for members in photos for photo in members])
        self.mask = torch.arange(int(counts.max())) < counts[:, None]
        self.places = torch.zeros_like(self.mask, dtype=torch.long).masked_scatter(
            self.mask, torch.arange(len(self.images))
        )

    def fuse(self, fusion: Fusion, features: Tensor, rows: Tensor) -> Fused:
        """Features (N, d) of all photos -> those of some sets, fused."""
        return self._asked(fusion, features[self.places[rows]], rows)

    def encode_and_fuse(self, model: Classifier, fusion: Fusion, rows: Tensor) -> Fused:
        """The same with an encoder that learns."""
        mask = self.mask[rows]
        features = model.features(self.images[self.places[rows][mask]])  # (members, d)
        members = features.new_zeros(*mask.shape, features.shape[1]).masked_scatter(mask[..., None], features)
        return self._asked(fusion, members, rows)

    def _asked(self, fusion: Fusion, members: Tensor, rows: Tensor) -> Fused:
        return fusion(members, self.mask[rows], self.queries[rows] if fusion.query_dim else None)


class Classifiers(Learner):
    """Pretrained on single photos for each seed; then the fusion learns on sets, and what `Settings.learns` adds.

    All photos in one large image are reduced to the size of one, as by a vision-language model's processor; encoder and
    linear layer are fine-tuned on it, whatever the fusions may learn.
    """

    def __init__(self, settings: Settings, folder: Path, device: str = "cpu") -> None:
        super().__init__(settings, folder, device)
        self._seen: tuple[int, dict[Which, Tensor]] = (-1, {})  # of one seed
        self._packed: dict[Which, Sets] = {}

    def learned(self, entry: str, seed: int) -> Iterable[CellAnswers]:
        model, (kind, dropped) = self._pretrained(seed), FUSED.get(entry, (None, False))
        fusion = None if kind is None else self._fused(model, kind, seed, dropped)
        if entry == FINE_TUNED:
            self._tune_on_large(model, seed)
        ((task, _),) = self.settings.tasks.items()
        with torch.no_grad():
            for cell in self.cells:
                by_fusion = fusion and self._by_fusion(model, fusion, (cell, dropped), seed)
                yield cell, {task: by_fusion or self._by_image(model, entry, cell)}

    @cached_property
    def _classes(self) -> list[str]:
        ((_, answers),) = self.image_sets.answers.items()
        return sorted(set(answers))

    def _targets(self, answers: dict[str, list[str]]) -> Tensor:
        ((_, texts),) = answers.items()
        return torch.tensor([self._classes.index(text) for text in texts])

    @cached_property
    def _questions(self) -> list[str]:
        ((_, questions),) = self.image_sets.questions.items()
        return sorted(set(questions))

    def _queries(self, questions: dict[str, list[str]]) -> Tensor:
        """(B, q): one of q questions, of unit scale."""
        ((task, texts),) = questions.items()
        for text in set(texts) - set(self._questions):
            raise InputError(f"fusion.tasks.{task}.question", text, "is a question that no training set is asked")
        chosen = torch.tensor([self._questions.index(text) for text in texts])
        return one_hot(chosen, len(self._questions)) * len(self._questions) ** 0.5

    def _sets(self, which: Which) -> Sets:
        if which not in self._packed:
            sets = self.sets(*which)
            self._packed[which] = Sets(sets.photos, self._queries(sets.questions))
        return self._packed[which]

    def _features(self, model: Classifier, which: Which, seed: int) -> Tensor:
        """What the frozen encoder of a seed makes of all photos (N, d): all fusions see the same."""
        if self._seen[0] != seed:
            self._seen = (seed, {})
        if which not in self._seen[1]:
            with torch.no_grad():
                self._seen[1][which] = model.features(self._sets(which).images)
        return self._seen[1][which]

    # ------------------------------------------------------------------------------------------------------- learning

    def _pretrained(self, seed: int) -> Classifier:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            questions = len(self._questions) if self.settings.told else 0
            model = Classifier(self.settings.encoder, self.settings.data.size, len(self._classes), questions)
        model.encoder.load_initial_weights()
        path = self.folder / f"classifier-{seed}.safetensors"

        def write(partial: Path) -> None:
            sets = Sets(self.single.photos, self._queries(self.single.questions))
            targets = self._targets(self.single.answers)

            def loss(rows: Tensor) -> Tensor:
                return cross_entropy(model.answer(model.features(sets.images[rows]), sets.queries[rows]), targets[rows])

            fit(model.parameters(), loss, len(targets), self.settings.pretraining, seed)
            save_model(model, str(partial))

        load_model(model, str(stored(path, write)))
        return model.eval()

    def _fused(self, model: Classifier, kind: str, seed: int, dropped: bool = False) -> Fusion:
        sets = self._sets((None, dropped))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            query_dim = len(self._questions) if kind in ASKED else None
            fusion = build_fusion(kind, model.encoder.width, self.settings.hidden, query_dim)
        if self._encoder_learns:

            def fuse(rows: Tensor) -> Tensor:
                return sets.encode_and_fuse(model, fusion, rows).embedding

        else:
            features = self._features(model, (None, dropped), seed)

            def fuse(rows: Tensor) -> Tensor:
                return sets.fuse(fusion, features, rows).embedding

        self._learn(model, [fusion, *self._parts(model)], fuse, seed)
        return fusion

    def _tune_on_large(self, model: Classifier, seed: int) -> None:
        images = torch.stack([_pixels(self._in_one(photos)) for photos in self.image_sets.photos])
        self._learn(model, [model.head, model.encoder], lambda rows: model.features(images[rows]), seed)

    def _learn(self, model: Classifier, parts: list[nn.Module], embed: Callable[[Tensor], Tensor], seed: int) -> None:
        """``embed``: rows of the training image sets (B,) -> (B, d)."""
        targets, queries = self._targets(self.image_sets.answers), self._queries(self.image_sets.questions)
        learned = [parameter for part in parts for parameter in part.parameters()]

        def loss(rows: Tensor) -> Tensor:
            return cross_entropy(model.answer(embed(rows), queries[rows]), targets[rows])

        fit(learned, loss, len(targets), self.settings.training, seed)

    @property
    def _encoder_learns(self) -> bool:
        return self.settings.learns == "all"

    def _parts(self, model: Classifier) -> list[nn.Module]:
        """What learns besides a fusion."""
        return {"fusion": [], "head": [model.head], "all": [model.head, model.encoder]}[self.settings.learns]

    def _in_one(self, photos: Photos) -> PILImage.Image:
        return square(one_large(photos), self.settings.data.size)

    # ------------------------------------------------------------------------------------------------------ answering

    def _by_fusion(self, model: Classifier, fusion: Fusion, which: Which, seed: int) -> Answers:
        sets = self._sets(which)
        features = model.features(sets.images) if self._encoder_learns else self._features(model, which, seed)
        fused = sets.fuse(fusion, features, torch.arange(len(sets.mask)))
        weights = None if which[1] else fused.weights  # no distractor is left to weigh
        return Answers([[text] for text in self._named(model, fused.embedding, sets.queries)], weights)

    def _by_image(self, model: Classifier, entry: str, cell: Cell) -> Answers:
        """What single images say: the large one of all photos, the first, or each."""
        photos = self.test(cell).photos
        seen = {
            ZERO_SHOT: lambda members: [self._in_one(members)],
            FINE_TUNED: lambda members: [self._in_one(members)],
            SINGLE: lambda members: members[:1],
            BEST: lambda members: members,
        }[entry]
        chosen = [seen(members) for members in photos]
        queries = self._queries(self.test(cell).questions)
        each = queries.repeat_interleave(torch.tensor([len(members) for members in chosen]), dim=0)
        texts = iter(self._named(model, model.features(Sets(chosen, queries).images), each))
        return Answers([[next(texts) for _ in members] for members in chosen])

    def _named(self, model: Classifier, features: Tensor, queries: Tensor) -> list[str]:
        return [self._classes[index] for index in model.answer(features, queries).argmax(dim=1).tolist()]


class Retrieval(Classifiers):
    """Which of the held-out objects is it? The one whose front view is nearest, by the cosine of features.

    Of those objects, and of the sets' photos, training has seen none (``hold_out: objects`` of "image_sets"), and
    the linear layer is of no use.
    """

    @cached_property
    def _fronts(self) -> dict[str, PILImage.Image]:
        return front_views(self.settings)

    def _named(self, model: Classifier, features: Tensor, queries: Tensor) -> list[str]:
        names, images = list(self._fronts), torch.stack([_pixels(front) for front in self._fronts.values()])
        cosines = normalize(features, dim=1) @ normalize(model.features(images), dim=1).mT  # (B, objects)
        return [names[index] for index in cosines.argmax(dim=1).tolist()]


def _pixels(photo: object) -> Tensor:
    """(3, h, w) uint8."""
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1).contiguous()
