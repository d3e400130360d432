"""One data type, one file: how it enters diffusion space, how it is read out, and what its likelihood is.

To add a modality: write its file, add a line here, add a parameter to the contract test. One of your own needs neither:
name it in the config by import path, `kind: my_pkg.depth:Depth`.
"""

from mmdiff.errors import InputError
from mmdiff.modalities.anchor import Anchor, FillsAnchor, KnownPart
from mmdiff.modalities.base import Condition, Modality, Shape, Value
from mmdiff.modalities.dense import Dense
from mmdiff.modalities.diffusible import Diffusible
from mmdiff.modalities.embedding import Embedding
from mmdiff.modalities.image import Image
from mmdiff.modalities.image_set import ImageSet
from mmdiff.modalities.import_path import imported
from mmdiff.modalities.label import Label
from mmdiff.modalities.mask import Mask
from mmdiff.modalities.masked_image import MaskedImage
from mmdiff.modalities.query import Asked
from mmdiff.modalities.text import Text
from mmdiff.modalities.vector import Vector
from mmdiff.trust import is_custom

MODALITIES: dict[str, type[Condition]] = {
    "dense": Dense,
    "embedding": Embedding,
    "image": Image,
    "image_set": ImageSet,
    "label": Label,
    "mask": Mask,
    "masked_image": MaskedImage,
    "text": Text,
    "vector": Vector,
}

__all__ = [
    "MODALITIES",
    "Anchor",
    "Asked",
    "Condition",
    "Dense",
    "Diffusible",
    "Embedding",
    "FillsAnchor",
    "Image",
    "ImageSet",
    "KnownPart",
    "Label",
    "Mask",
    "MaskedImage",
    "Modality",
    "Shape",
    "Text",
    "Value",
    "Vector",
    "find_modality",
]


def find_modality(kind: str, key: str) -> type[Condition]:
    """The class that a config names: one of `MODALITIES`, or an import path "package.module:Class".

    Args:
        kind: the name.
        key: where it stands, for the message.

    Raises:
        InputError: when there is no such class, or it is no `Condition`; nothing of it is called.
    """
    if kind in MODALITIES:
        return MODALITIES[kind]
    if not is_custom(kind):
        known = ", ".join(sorted(MODALITIES))
        raise InputError(key, kind, f"choose one of {known}, or write an import path: my_pkg.depth:Depth")
    cls = imported(key, kind)
    if not (isinstance(cls, type) and issubclass(cls, Condition)):
        raise InputError(key, kind, "is no subclass of mmdiff.modalities.Modality or Condition; it was not called")
    return cls
