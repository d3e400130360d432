"""One data type, one file: how it enters diffusion space, how it is read out, and what its likelihood is.

To add a modality: write its file, add a line here, add a parameter to the contract test.
"""

from mmdiff.modalities.base import Modality, Shape
from mmdiff.modalities.image import Image
from mmdiff.modalities.label import Label

MODALITIES: dict[str, type[Modality]] = {"image": Image, "label": Label}

__all__ = ["MODALITIES", "Image", "Label", "Modality", "Shape"]
