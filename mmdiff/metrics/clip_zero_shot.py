"""CLIP zero-shot classification, a baseline for labels that sees no training row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from mmdiff.clip import HUB, LOCAL_FOLDER, check_listed, image_tower, load_clip
from mmdiff.errors import InputError

KEY = "evaluate.zero_shot"
BATCH_SIZE = 64


class ZeroShot:
    """Classifies images by the nearest caption.

    Args:
        model, pretrained, device: as of `mmdiff.clip.load_clip`.
        names: of the classes, in the order of their ids.
        template: a caption with {} for the name.

    Raises:
        InputError: naming evaluate.zero_shot.model, .pretrained, .names or .template.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None,
        names: Sequence[str],
        template: str = "a photo of a {}.",
        device: str | None = None,
    ) -> None:
        import open_clip

        check_captions(model, names, template)
        clip, preprocess = load_clip(KEY, model, pretrained, device)
        self._embed = image_tower(clip, preprocess)
        captions = open_clip.get_tokenizer(model)([template.replace("{}", name) for name in names])
        with torch.no_grad():
            text = clip.encode_text(captions.to(next(clip.parameters()).device), normalize=True)
        self._text = text.float()  # (K, D)
        weights = [] if pretrained is None else [Path(pretrained).name]
        self.name = "/".join([f"CLIP zero-shot {model.rstrip('/')}", *weights])

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, 1 or 3, H, W) in [−1, 1] -> class ids (n,), int64, on the CPU."""
        levels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
        classes = []
        for part in levels.split(BATCH_SIZE):
            features = torch.nn.functional.normalize(self._embed([to_pil_image(image) for image in part]), dim=1)
            classes.append((features @ self._text.T).argmax(dim=1).cpu())  # (n, K) cosines -> (n,)
        return torch.cat(classes)


def check_captions(model: str, names: Sequence[str] | None, template: str) -> None:
    """What can be known without weights.

    Raises:
        InputError: naming evaluate.zero_shot.model, .names or .template.
    """
    if "{}" not in template:
        raise InputError(f"{KEY}.template", template, "must contain {} for the name of the class")
    if not names:
        raise InputError(f"{KEY}.names", names, "name the classes; the data does not")
    if not model.startswith((LOCAL_FOLDER, HUB)):
        check_listed(f"{KEY}.model", model)
