"""What a model and a pipeline with LoRA layers can do besides."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin

from mmdiff.errors import InputError
from mmdiff.lora.folder import KEY, Adapter
from mmdiff.lora.layers import merged


class LoraModel:
    """A model whose LoRA layers are merged where it is saved."""

    @functools.wraps(ModelMixin.save_pretrained)  # pipelines look at the arguments
    def save_pretrained(self, *arguments: Any, **settings: Any) -> Any:
        return ModelMixin.save_pretrained(merged(self), *arguments, **settings)


class LoraPipeline:
    """A pipeline whose ``model`` takes one adapter at a time."""

    _adapter: Adapter | None = None

    def load_lora_weights(self, folder: str | os.PathLike) -> None:
        """Put an adapter into the model: LoRA layers, and the parts of the modalities that were trained with them.

        Args:
            folder: `adapter/` of a run, or one that peft wrote for this model. Only safetensors and JSON are read.

        Raises:
            InputError: it does not fit the model, or another adapter is loaded; the model is left as it was.
        """
        if self._adapter is not None:
            raise InputError(KEY, str(folder), "another adapter is loaded; call unload_lora_weights first")
        self._adapter = Adapter(getattr(self.model, "_orig_mod", self.model), Path(folder).expanduser())

    def fuse_lora(self) -> None:
        """Merge the LoRA layers into the weights: sampling costs what it did without, and peft is not needed.

        Raises:
            InputError: no adapter is loaded.
        """
        self._loaded().fuse()

    def unload_lora_weights(self) -> None:
        """Give the model the weights that it had before the adapter, bit by bit, also after `fuse_lora`.

        Raises:
            InputError: no adapter is loaded.
        """
        self._loaded().unload()
        self._adapter = None

    def _loaded(self) -> Adapter:
        if self._adapter is None:
            raise InputError(KEY, None, "no adapter is loaded; call load_lora_weights first")
        return self._adapter
