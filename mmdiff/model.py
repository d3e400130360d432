"""The model: modalities around one backbone, saved as safetensors and JSON like any diffusers model."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from mmdiff.backbones import Observation, find_backbone
from mmdiff.errors import InputError, at
from mmdiff.lora import LoraModel
from mmdiff.modalities import Anchor, Condition, FillsAnchor, Modality, Shape, find_modality
from mmdiff.modalities.grids import scaled
from mmdiff.modalities.query import built, query_slots
from mmdiff.observation import Noisy, gains_of, observation_of, slots_of, width_of
from mmdiff.schedulers.arguments import check_value
from mmdiff.slots import Axes, Slot, of
from mmdiff.trust import check_links, damage, refuse_custom, refuse_huge
from mmdiff.values import check_names, dtypes, in_dtype

_WRONG_SLOTS = "its slots are not those of its tensors; see mmdiff check-modality"
_HUB_ARGUMENTS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")


@dataclass
class MTDiffusionModelOutput(BaseOutput):
    """``prediction`` (B, C, H, W) of u_t; ``params`` {auxiliary modality with a head: parameters of p_θ(x_i | z_t)};
    ``pooled`` (B, P) of the backbone."""

    prediction: Tensor
    params: dict[str, Tensor]
    pooled: Tensor


class MTDiffusionModel(LoraModel, ModelMixin, ConfigMixin):
    """Encoders, one backbone and decoder heads.

    Args:
        modality_config: {name: {"kind": one of MODALITIES or an import path, …constructor arguments}}.
        backbone_config: {"kind": one of BACKBONES, …constructor arguments}.
        anchor: the modality x_0 that is diffused; its encoder fixes the diffusion space.
        observable: the modalities that training may observe, which sampling can then concatenate; None: all.
        diffused: {auxiliary modality with a process of its own: gain of its signal}, Eq. (25); None: none.
    """

    @register_to_config
    def __init__(
        self,
        modality_config: dict[str, dict[str, Any]],
        backbone_config: dict[str, Any],
        anchor: str = "image",
        observable: list[str] | None = None,
        diffused: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(modality_config, backbone_config, anchor, observable)
        if anchor not in modality_config:
            raise InputError("anchor", anchor, f"is no modality; choose one of {', '.join(sorted(modality_config))}")
        backbone, backbone_settings = find_backbone(backbone_config.get("kind")), _settings(backbone_config)
        kinds = {name: _modality(name, modality_config[name]) for name in sorted(modality_config)}
        anchor_class, anchor_settings = kinds[anchor]
        if not issubclass(anchor_class, Anchor):
            raise InputError("anchor", anchor, "cannot be diffused itself; choose an image modality")
        with at(f"modalities.{anchor}"):
            space = anchor_class.diffusion_space(**anchor_settings)
        shape = Shape(space, *backbone.widths(**backbone_settings))
        self.anchor = anchor
        self.names = tuple(kinds)  # sorted: saved configs do not keep the order of dicts
        self.observable = frozenset(self.names if observable is None else observable)
        self.auxiliary = tuple(name for name in self.names if name != anchor)
        self.modalities = nn.ModuleDict(built(kinds, shape, anchor, self.observable))
        self.generated = tuple(name for name in self.auxiliary if isinstance(self.modalities[name], Modality))
        self.filling = tuple(name for name in self.auxiliary if isinstance(self.modalities[name], FillsAnchor))
        for name in self.filling:
            with at(f"modalities.{name}"):
                self.modalities[name].check_anchor(self.modalities[anchor])
        self.gains = gains_of(diffused, self.modalities, self.auxiliary)
        observed = sum(modality.observation_channels for modality in self.modalities.values())
        widths = tuple(width_of(modality, name in self.gains) for name, modality in self.modalities.items())
        self.backbone = backbone(space, observed, widths, **backbone_settings)
        self.space, self.pooled_width = space, shape.pooled

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, trust_custom_modalities: bool = False, **kwargs: Any
    ) -> MTDiffusionModel:
        """Load what `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: a folder or a hub repository.
            trust_custom_modalities: import the modalities that its config names by import path.
            kwargs: of diffusers' `ModelMixin.from_pretrained`.

        Raises:
            InputError: for custom modalities that are not trusted, before an import; for a link out of a local folder,
                an unknown argument and a damaged folder.
        """
        path = pretrained_model_name_or_path
        check_links("model", path)
        if trust_custom_modalities is not True:  # a text such as "no" is true
            hub = {key: value for key, value in kwargs.items() if key in _HUB_ARGUMENTS}
            with damage("model", path):
                _refuse_custom(cls.load_config(path, **hub))  # before weights are read
        # diffusers would build in this dtype, and leave it as the process's default if the initialisation fails
        chosen = dtypes(kwargs.pop("torch_dtype", None), kwargs.pop("dtype", None))["model"]
        # low_cpu_mem_usage builds on the meta device, on which fixed palettes and maps have no values
        kwargs |= {"low_cpu_mem_usage": False, "use_safetensors": True}
        kwargs |= {"trust_custom_modalities": trust_custom_modalities}
        with damage("model", path):
            model = super().from_pretrained(path, **kwargs)
        for tensor in (*model.parameters(), *model.buffers()):  # tensors in the file are not aligned to 64 bytes, where
            tensor.data = tensor.data.clone()  # kernels round otherwise: samples would differ in the last bit
        return in_dtype(model, chosen)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], trust_custom_modalities: bool = False, **kwargs: Any
    ) -> MTDiffusionModel:
        """Build the model of a config with random weights; errors as of `from_pretrained`.

        Args:
            config: of a model.
            trust_custom_modalities: as of `from_pretrained`.
            kwargs: arguments of the constructor, which replace the config's.
        """
        arguments = list(inspect.signature(cls.__init__).parameters)[1:]
        check_names(kwargs, (*arguments, "return_unused_kwargs"))
        if not isinstance(config, Mapping) or not {"modality_config", "backbone_config"} <= {*config, *kwargs}:
            raise InputError("config", config, "needs the config of a model: modality_config, backbone_config, …")
        if trust_custom_modalities is not True:
            _refuse_custom(config)
        return super().from_config(config, **kwargs)

    def of_size(self, height: int | None = None, width: int | None = None) -> Self:
        """The same model, with the same weights, for anchors of another size; None: that of its config.

        Args:
            height, width: of the anchor's values, in pixels.

        Raises:
            InputError: naming what cannot have this size.
        """
        base, space = self.modalities[self.anchor].value_shape[-2:], self.space[1:]
        size = (base[0] if height is None else height, base[1] if width is None else width)
        if size == tuple(base):
            return self
        size_text, unit = f"{size[1]}x{size[0]}", self.backbone.multiple
        with at(f"height and width, {self.anchor}", join=None):
            rows, columns = scaled(space, base, size)
        if rows % unit or columns % unit or not rows or not columns:
            steps = f"{unit * base[0] // space[0]} and {unit * base[1] // space[1]}"
            raise InputError("height and width", size_text, f"need multiples of {steps} pixels for this backbone")
        other = copy.copy(self)
        other.space = (self.space[0], rows, columns)
        other._modules = dict(self._modules)  # the copy's own, of the same modules
        other.modalities = nn.ModuleDict()
        for name, modality in self.modalities.items():
            with at(f"modalities.{name}"):
                other.modalities[name] = modality.in_space(rows, columns)
        return other

    def load_initial_weights(self) -> None:
        """Read the pretrained weights that the modalities' settings name, at the start of a run."""
        for name, modality in self.modalities.items():
            with at(f"modalities.{name}"):
                modality.load_initial_weights()

    def slots(self, by_name: Collection[str]) -> dict[str, Axes]:
        """Slots of the state's entries, for fine-tuning: {name in the state dict: axes}.

        Args:
            by_name: modalities whose classes are matched by name.

        Raises:
            InputError: if a modality gives another number of slots than its tensors, channels or context have.
        """
        axes_of: dict[str, Axes] = {}
        channels: list[Slot] = []
        flags: list[Slot] = []
        for name, modality in self.modalities.items():
            parts, owner = modality.slots(name in by_name), (name, type(modality))
            if (len(parts.channels), len(parts.context)) != (modality.observation_channels, modality.context_width):
                raise InputError(f"modalities.{name}", type(modality).__name__, _WRONG_SLOTS)
            axes_of |= {f"modalities.{name}.{tensor}": axes for tensor, axes in parts.state.items()}
            channels += of(owner, parts.channels)
            flags += of(owner, slots_of(parts, name in self.gains))
        axes_of |= query_slots(self.modalities, by_name)
        axes_of |= {f"backbone.{tensor}": axes for tensor, axes in self.backbone.slots(channels, flags).items()}
        state = self.state_dict()
        for tensor, axes in axes_of.items():
            shape = state[tensor].shape if tensor in state else ()
            if not all(dim < len(shape) and shape[dim] == len(axis.slots) for dim, axis in axes.items()):
                raise InputError(tensor, tuple(shape), _WRONG_SLOTS)
        return axes_of

    @property
    def value_dtype(self) -> torch.dtype:
        """The dtype outside the networks (z_t, encodings, likelihoods): float32, or the weights' dtype if wider."""
        return torch.promote_types(next(self.backbone.parameters()).dtype, torch.float32)

    def encode(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name: E_i(x_i)}, (B, C, H, W) each."""
        return {name: self.modalities[name].encode(value) for name, value in values.items()}

    def observation(
        self,
        values: Mapping[str, Tensor],
        aggregated: Mapping[str, Tensor],
        observed: Mapping[str, Tensor],
        like: Tensor,
        noisy: Mapping[str, Noisy] | None = None,
    ) -> Observation:
        """The backbone's second input, from the states of all modalities.

        Args:
            values: values of at least the observed modalities.
            aggregated, observed: {name: (B,) bool}; a missing name means False.
            like: a tensor (B, C, H, W) of the device, dtype and size.
            noisy: {diffused modality: its noisy signal and time}; others of them are observed or absent.
        """
        return observation_of(self.modalities, self.gains, values, aggregated, observed, noisy or {}, like)

    def signal(self, name: str, value: Tensor) -> Tensor:
        """z^i_0 = gain · S_i(x_i) of a diffused modality, Eq. (25)."""
        return self.gains[name] * self.modalities[name].signal(value)

    def expected_signal(self, name: str, params: Tensor) -> Tensor:
        """The same under the law of the modality's head: gain · E[S_i(x_i)]."""
        return self.gains[name] * self.modalities[name].expected_signal(params)

    def forward(
        self, sample: Tensor, timestep: Tensor, observation: Observation, heads: Collection[str] | None = None
    ) -> MTDiffusionModelOutput:
        """One evaluation at z_t = ``sample`` (B, C, H, W), ``timestep`` (B,) in 0 … T − 1.

        Backbone and heads compute in the weights' dtype; the outputs have the dtype of ``sample``. ``heads``: names of
        the modalities whose heads are read; None: all.
        """
        inside, outside = next(self.backbone.parameters()).dtype, sample.dtype
        output = self.backbone(sample.to(inside), timestep, observation.to(inside))
        params = {
            name: self.modalities[name].decode(output.features, output.pooled).to(outside)
            for name in self.generated
            if heads is None or name in heads
        }
        return MTDiffusionModelOutput(
            prediction=output.prediction.to(outside), params=params, pooled=output.pooled.to(outside)
        )


def complete(model: MTDiffusionModel, autoencoder: nn.Module | None) -> MTDiffusionModel:
    """The model, unless its anchor is latent and its folder holds no autoencoder."""
    if autoencoder is None and getattr(model.modalities[model.anchor], "latent", False):
        raise InputError("model_index.json: autoencoder", None, "is missing in the folder")
    return model


def _refuse_custom(config: Mapping[str, Any]) -> None:
    refuse_custom(config.get("modality_config", {}))
    refuse_custom(config.get("backbone_config", {}), "backbone")
    refuse_huge(config.get("backbone_config", {}), "backbone")


def _check_arguments(modality_config: Any, backbone_config: Any, anchor: Any, observable: Any) -> None:
    check_value("modality_config", modality_config, dict[str, dict[str, Any]])
    check_value("backbone_config", backbone_config, dict[str, Any])
    check_value("anchor", anchor, str)
    check_value("observable", observable, list[str] | None)
    for name in observable or ():
        if name not in modality_config:
            raise InputError("observable", name, f"choose from {', '.join(sorted(modality_config))}")


def _modality(name: str, config: Mapping[str, Any]) -> tuple[type[Condition], dict[str, Any]]:
    check_name(name)
    return find_modality(config.get("kind"), f"modalities.{name}.kind"), _settings(config)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "kind"}


def check_name(name: str) -> None:
    """Refuse a modality's name that cannot be an attribute, a file name and a config key.

    Raises:
        InputError: naming it.
    """
    if not name.isidentifier() or len(name) > 100 or hasattr(nn.ModuleDict(), name):
        raise InputError("modalities", name, "a modality's name must be an identifier that nn.ModuleDict can hold")
