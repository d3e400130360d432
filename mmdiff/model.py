"""The model: modalities around one backbone. Saved as safetensors + JSON, like any diffusers model."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from mmdiff.backbones import BACKBONES, Backbone, Observation
from mmdiff.errors import InputError
from mmdiff.modalities import Anchor, Condition, FillsAnchor, Modality, Shape, find_modality
from mmdiff.schedulers.arguments import check_value
from mmdiff.slots import Axes, Slot, of, slots
from mmdiff.trust import check_links, damage, refuse_custom, refuse_huge
from mmdiff.values import check_names

_OTHER_SLOTS = "its slots are not those of its tensors; see mmdiff check-modality"
_HUB_ARGUMENTS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")


@dataclass
class MTDiffusionModelOutput(BaseOutput):
    """``prediction`` (B, C, H, W) of u_t; ``params`` {auxiliary modality with a head: parameters of p_θ(x_i | z_t)};
    ``pooled`` (B, P), the backbone's."""

    prediction: Tensor
    params: dict[str, Tensor]
    pooled: Tensor


class MTDiffusionModel(ModelMixin, ConfigMixin):
    """Encoders, one backbone and decoder heads.

    Args:
        modality_config: {name: {"kind": one of MODALITIES or an import path, …constructor arguments}}.
        backbone_config: {"kind": one of BACKBONES, …constructor arguments}.
        anchor: the modality x_0 that is diffused; its encoder fixes the diffusion space.
        observable: the modalities that training shows as observed, which sampling then does too; None: all.
    """

    @register_to_config
    def __init__(
        self,
        modality_config: dict[str, dict[str, Any]],
        backbone_config: dict[str, Any],
        anchor: str = "image",
        observable: list[str] | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(modality_config, backbone_config, anchor, observable)
        if anchor not in modality_config:
            raise InputError("anchor", anchor, f"is no modality; choose one of {', '.join(sorted(modality_config))}")
        backbone, backbone_settings = _backbone(backbone_config)
        kinds = {name: _modality(name, modality_config[name]) for name in sorted(modality_config)}
        anchor_class, anchor_settings = kinds[anchor]
        if not issubclass(anchor_class, Anchor):
            raise InputError("anchor", anchor, "cannot be diffused itself; choose an image modality")
        with _prefixed(f"modalities.{anchor}"):
            space = anchor_class.diffusion_space(**anchor_settings)
        shape = Shape(space, *backbone.widths(**backbone_settings))
        self.anchor = anchor
        self.names = tuple(kinds)  # sorted: nothing depends on the order of a dict in a file
        self.observable = frozenset(self.names if observable is None else observable)
        self.auxiliary = tuple(name for name in self.names if name != anchor)
        self.modalities = nn.ModuleDict()
        for name, (modality, settings) in kinds.items():
            with _prefixed(f"modalities.{name}"):
                self.modalities[name] = modality(shape, **{**settings, "head": False} if name == anchor else settings)
        self.generated = tuple(name for name in self.auxiliary if isinstance(self.modalities[name], Modality))
        self.filling = tuple(name for name in self.auxiliary if isinstance(self.modalities[name], FillsAnchor))
        for name in self.filling:
            with _prefixed(f"modalities.{name}"):
                self.modalities[name].check_anchor(self.modalities[anchor])
        observed = sum(modality.observation_channels for modality in self.modalities.values())
        width = sum(2 + modality.context_width for modality in self.modalities.values())
        self.backbone = backbone(space, observed, width, **backbone_settings)
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
            InputError: when the config names custom modalities and they are not trusted, or a link leads out of a
                local folder, and nothing is imported then; for an unknown argument, and a damaged folder.
        """
        path = pretrained_model_name_or_path
        check_links("model", path)
        if trust_custom_modalities is not True:  # a text such as "no" would count as true
            hub = {key: value for key, value in kwargs.items() if key in _HUB_ARGUMENTS}
            with damage("model", path):
                _refuse_custom(cls.load_config(path, **hub))  # before weights are looked for
        # diffusers would build in it, and leave it as the process's default where a start cannot be drawn in it
        chosen = dtypes(kwargs.pop("torch_dtype", None), kwargs.pop("dtype", None))["model"]
        # low_cpu_mem_usage builds on the meta device, where the fixed starts of palettes and maps have no values
        kwargs |= {"low_cpu_mem_usage": False, "use_safetensors": True}
        kwargs |= {"trust_custom_modalities": trust_custom_modalities}
        with damage("model", path):
            model = super().from_pretrained(path, **kwargs)
        for tensor in (*model.parameters(), *model.buffers()):  # out of the file: at other addresses than multiples of
            tensor.data = tensor.data.clone()  # 64 bytes kernels round otherwise, and samples differ in the last bit
        return in_dtype(model, chosen)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], trust_custom_modalities: bool = False, **kwargs: Any
    ) -> MTDiffusionModel:
        """Build what a config describes, with weights drawn at random; errors as of `from_pretrained`.

        Args:
            config: of a model.
            trust_custom_modalities: as of `from_pretrained`.
            kwargs: arguments of the constructor, over the config's.
        """
        own = list(inspect.signature(cls.__init__).parameters)[1:]
        check_names(kwargs, (*own, "return_unused_kwargs"))  # what diffusers' `from_pretrained` does not read, too
        if not isinstance(config, Mapping) or not {"modality_config", "backbone_config"} <= {*config, *kwargs}:
            raise InputError("config", config, "needs the config of a model: modality_config, backbone_config, …")
        if trust_custom_modalities is not True:
            _refuse_custom(config)
        return super().from_config(config, **kwargs)

    def load_initial_weights(self) -> None:
        """Pretrained weights that the modalities' settings name; for the start of a run."""
        for name, modality in self.modalities.items():
            with _prefixed(f"modalities.{name}"):
                modality.load_initial_weights()

    def slots(self, by_name: Collection[str]) -> dict[str, Axes]:
        """What entries of the state belong to, for fine-tuning: {name in the state dict: axes}.

        Args:
            by_name: modalities whose classes are told apart by name.

        Raises:
            InputError: a modality gives another number of slots than its tensor, its channels or its context has.
        """
        found: dict[str, Axes] = {}
        channels: list[Slot] = []
        flags: list[Slot] = []
        for name, modality in self.modalities.items():
            own, owner = modality.slots(name in by_name), (name, type(modality))
            if (len(own.channels), len(own.context)) != (modality.observation_channels, modality.context_width):
                raise InputError(f"modalities.{name}", type(modality).__name__, _OTHER_SLOTS)
            found |= {f"modalities.{name}.{tensor}": axes for tensor, axes in own.state.items()}
            channels += of(owner, own.channels)
            flags += of(owner, [*slots(("aggregated", "observed")), *own.context])
        found |= {f"backbone.{tensor}": axes for tensor, axes in self.backbone.slots(channels, flags).items()}
        state = self.state_dict()
        for tensor, axes in found.items():
            shape = state[tensor].shape if tensor in state else ()
            if not all(dim < len(shape) and shape[dim] == len(axis.slots) for dim, axis in axes.items()):
                raise InputError(tensor, tuple(shape), _OTHER_SLOTS)
        return found

    @property
    def value_dtype(self) -> torch.dtype:
        """Of everything outside the networks (z_t, encodings, the heads' likelihoods): float32, or the weights' own
        where that is wider."""
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
    ) -> Observation:
        """The backbone's second input, from the states of all modalities.

        Args:
            values: values of at least the observed modalities.
            aggregated, observed: {name: (B,) bool}; a missing name means nowhere.
            like: a tensor (B, C, H, W) whose device, dtype and size count.
        """
        nowhere = torch.zeros(len(like), dtype=torch.bool, device=like.device)
        channels, context = [], []
        for name in self.names:
            modality: Condition = self.modalities[name]
            seen = observed.get(name, nowhere)
            context += [torch.stack([aggregated.get(name, nowhere), seen], dim=1).to(like.dtype)]  # (B, 2)
            if name in values and name in observed:
                channels.append(modality.observe(values[name]).to(like.dtype) * seen[:, None, None, None])
                context.append(modality.context(values[name]).to(like.dtype) * seen[:, None])
            else:
                channels.append(like.new_zeros(len(like), modality.observation_channels, *like.shape[2:]))
                context.append(like.new_zeros(len(like), modality.context_width))
        return Observation(torch.cat(channels, dim=1), torch.cat(context, dim=1))

    def forward(self, sample: Tensor, timestep: Tensor, observation: Observation) -> MTDiffusionModelOutput:
        """One evaluation at z_t = ``sample`` (B, C, H, W), ``timestep`` (B,) in 0 … T − 1.

        Backbone and heads compute in the weights' precision; what they give is of ``sample``'s.
        """
        own, outside = next(self.backbone.parameters()).dtype, sample.dtype
        output = self.backbone(sample.to(own), timestep, Observation(*(part.to(own) for part in observation)))
        params = {
            name: self.modalities[name].decode(output.features, output.pooled).to(outside) for name in self.generated
        }
        return MTDiffusionModelOutput(
            prediction=output.prediction.to(outside), params=params, pooled=output.pooled.to(outside)
        )


DTYPES = {
    **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
    **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float64", "double"), torch.float64),
}


def dtypes(torch_dtype: Any, dtype: Any = None) -> dict[str, torch.dtype | None]:
    """{component: dtype}, as diffusers' arguments of these names say; None: as the weights are built.

    Args:
        torch_dtype, dtype: either of them: a dtype, its name, "auto" (None), or {component: one of these}, in which
            "default" stands for the others.

    Raises:
        InputError: for anything else, and where the two disagree.
    """
    if torch_dtype is not None and dtype is not None and dtypes(torch_dtype) != dtypes(dtype):
        raise InputError("dtype", dtype, f"contradicts torch_dtype = {torch_dtype}; pass one of them")
    given = dtype if torch_dtype is None else torch_dtype
    named = given if isinstance(given, Mapping) else {"default": given}
    for name in set(named) - {"default", "model", "autoencoder"}:
        raise InputError(f"torch_dtype.{name}", named[name], "names no network; choose default, model or autoencoder")
    return {name: _dtype(named.get(name, named.get("default"))) for name in ("model", "autoencoder")}


def _dtype(given: Any) -> torch.dtype | None:
    if given is None or (isinstance(given, str) and given == "auto"):
        return None
    found = DTYPES.get(given.removeprefix("torch.")) if isinstance(given, str) else given
    if isinstance(found, torch.dtype) and found in DTYPES.values():
        return found
    raise InputError("torch_dtype", given, f"choose a floating torch dtype, auto or one of {', '.join(DTYPES)}")


def in_dtype(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The network in a precision, or as it is."""
    return network if dtype is None else nn.Module.to(network, dtype)


def complete(model: MTDiffusionModel, autoencoder: nn.Module | None) -> MTDiffusionModel:
    """The model, unless its anchor is latent and its folder holds no autoencoder: none is looked for elsewhere."""
    if autoencoder is None and getattr(model.modalities[model.anchor], "latent", False):
        raise InputError("model_index.json: autoencoder", None, "is missing, and none is looked for elsewhere")
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


def _backbone(config: Mapping[str, Any]) -> tuple[type[Backbone], dict[str, Any]]:
    """The class that a config names, and its own settings."""
    if config.get("kind") not in BACKBONES:
        raise InputError("backbone.kind", config.get("kind"), f"choose one of {', '.join(sorted(BACKBONES))}")
    return BACKBONES[config["kind"]], _settings(config)


def _modality(name: str, config: Mapping[str, Any]) -> tuple[type[Condition], dict[str, Any]]:
    check_name(name)
    return find_modality(config.get("kind"), f"modalities.{name}.kind"), _settings(config)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "kind"}


@contextlib.contextmanager
def _prefixed(key: str) -> Iterator[None]:
    """Errors of a class as errors of the config entry that named it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}.{error.key}", error.value, error.remedy) from None


def check_name(name: str) -> None:
    """Modality names are attributes, file names and config keys.

    Raises:
        InputError: for one that cannot be all of these.
    """
    if not name.isidentifier() or len(name) > 100 or hasattr(nn.ModuleDict(), name):
        raise InputError("modalities", name, "a modality's name must be an identifier that nn.ModuleDict can hold")
