"""Reconstructed images against the truth, in the hole and on the whole, for fixed hole patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mmdiff.config import Config, MaskingConfig
from mmdiff.data import Table
from mmdiff.data.masking import known_masks
from mmdiff.errors import InputError, at
from mmdiff.evaluation.judges import complete
from mmdiff.metrics.bootstrap import scored
from mmdiff.metrics.image import psnr, ssim
from mmdiff.metrics.lpips import Perceptual
from mmdiff.modalities.masked_image import mean_fill

SEED = 0  # of the holes: the same for every model
UNDRAWN = ("mean fill", "head")  # ways that depend neither on solver steps nor on a seed
Draw = Callable[..., dict[str, Tensor]]


class HoleScores:
    """Scores of filled held-out images.

    Args:
        config: `evaluate.masking` (default: the modality's own holes), `evaluate.num_samples`, `evaluate.lpips`.
        held_out: real rows.
        anchor: name of the image.
    """

    def __init__(self, config: Config, held_out: Table, anchor: str) -> None:
        self.config, self.anchor = config, anchor
        rows = held_out.all(min(config.evaluate.num_samples, len(held_out)))
        (self.truth,) = complete(rows, anchor)
        self.positions = rows.present[anchor].nonzero()[:, 0]  # a row keeps its hole whatever else is missing
        for title, masking in config.evaluate.masking.items():  # refused before anything is sampled
            self._known(f"evaluate.masking.{title}", masking)
        self.perceptual, self.facts = self._perceptual()
        self.facts |= {"mask seed": SEED, "filled images": len(self.truth)}

    def _perceptual(self) -> tuple[Perceptual | None, dict[str, Any]]:
        lpips = self.config.evaluate.lpips
        try:
            perceptual = Perceptual(lpips.net, lpips.backbone, lpips.heads)
        except InputError as error:
            if lpips.backbone or lpips.heads:
                raise
            return None, {"LPIPS": f"not measured: {error.remedy}"}  # torchvision's weights are not here
        return perceptual, perceptual.facts()

    def fills(
        self, name: str, draw: Draw, by: tuple[str, ...] = (*UNDRAWN, "samples")
    ) -> Iterator[tuple[dict[str, Any], Tensor, Tensor, Tensor]]:
        """(setting, masked value, known pixels, filled images) of every hole pattern and every way to fill it.

        Args:
            name: of the masked image.
            draw: (count, observed=…, …) -> samples.
            by: which of the mean fill, the head and samples; those are left out that were not trained.
        """
        states, own = self.config.states, self.config.data.masking.get(name, MaskingConfig())
        for title, masking in (self.config.evaluate.masking or {name: own}).items():
            known = self._known(f"evaluate.masking.{title}", masking)
            value = torch.cat([self.truth * known, known], dim=1)
            fills = {}
            if "mean fill" in by:
                fills["mean fill"] = mean_fill(self.truth, known)
            if "head" in by and states.anchor_hidden > 0:
                fills["head"] = draw(len(value), observed={name: value}, num_inference_steps=0)[self.anchor]
            if "samples" in by and states.anchor_hidden < 1:
                fills["samples"] = draw(len(value), observed={name: value})[self.anchor]
            for by_name, images in fills.items():
                about = {"holes": title, "pattern": masking.pattern, "ratio": list(masking.ratio), "by": by_name}
                yield about, value, known, pasted(images, self.truth, known)

    def _known(self, key: str, masking: MaskingConfig) -> Tensor:
        """(n, 1, H, W), 1 = known."""
        with at(key):
            return known_masks(masking.pattern, masking.ratio, *self.truth.shape[2:], SEED, self.positions)

    def scores(self, filled: Tensor, known: Tensor) -> dict[str, Any]:
        """LPIPS, PSNR and SSIM, in the hole and on the whole (of which all but the hidden share is the truth)."""
        result = {"n": len(filled), "hidden share": float(1 - known.mean())}
        for name, values in per_image(filled, self.truth, known, self.perceptual).items():
            result |= scored(name, values)
        return result


def pasted(images: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Images (n, C, H, W) of any method, clipped to [−1, 1], with the known pixels of the truth bit by bit."""
    filled = torch.where(known > 0, truth, images.to(truth.dtype).clamp(-1, 1))
    assert torch.equal(filled * known, truth * known)
    return filled


def per_image(filled: Tensor, truth: Tensor, known: Tensor, perceptual: Perceptual | None) -> dict[str, Tensor]:
    """{"LPIPS, hole": (n,), …}: LPIPS (where there are weights), PSNR and SSIM, on the hole and on the whole.

    Args:
        filled, truth: (n, C, H, W) in [−1, 1].
        known: (n, 1, H, W), 0 in the hole.
        perceptual: the LPIPS to use, or None.
    """
    hole, scores = 1 - known, {}
    if perceptual is not None:
        scores["LPIPS, hole"] = perceptual.hole(filled, truth, hole)
        scores["LPIPS, whole"] = perceptual.whole(filled, truth)
    for title, mask in (("hole", hole), ("whole", None)):
        scores[f"PSNR, {title}"] = psnr(filled, truth, mask)
        scores[f"SSIM, {title}"] = ssim(filled, truth, mask)
    return scores
