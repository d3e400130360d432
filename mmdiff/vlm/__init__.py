"""Several photos in front of a vision-language model of Hugging Face transformers (docs/theory.md, section 7)."""

from mmdiff.vlm.architectures import ARCHITECTURES, architecture_of
from mmdiff.vlm.model import Answered, Generated, VisionLanguageModel
from mmdiff.vlm.reader import Inputs, Reader

__all__ = ["ARCHITECTURES", "Answered", "Generated", "Inputs", "Reader", "VisionLanguageModel", "architecture_of"]
