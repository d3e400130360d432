"""LoRA (Hu et al., 2021, arXiv 2106.09685) by peft: W x + (α / r) B A x in linear layers whose W is frozen.

A model with LoRA layers trains them, and the parts through which modalities enter and are read. Merged into
W + (α / r) B A it needs no peft any more.
"""

from mmdiff.lora.folder import CONFIG, LAYERS, WHOLE, Adapter, save
from mmdiff.lora.layers import add, base_name, layers, merged, merged_tensors
from mmdiff.lora.mixins import LoraModel, LoraPipeline

__all__ = [
    "CONFIG",
    "LAYERS",
    "WHOLE",
    "Adapter",
    "LoraModel",
    "LoraPipeline",
    "add",
    "base_name",
    "layers",
    "merged",
    "merged_tensors",
    "save",
]
