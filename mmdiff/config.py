"""One experiment as data: pydantic models, read from YAML and `key=value` overrides; unknown keys are errors.

Nothing of the package but the error is imported here: a config can be read, checked and shown without torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import pydantic
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from mmdiff.errors import InputError

Share = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(ge=0)]
_NUMBERS = (int, float, int | None, float | None)


class _Base(BaseModel):
    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation in _NUMBERS:
            raise ValueError("must be a number")
        return value


class _Strict(_Base):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Open(_Base):
    """Further keys are constructor arguments of the class that `kind` names; `mmdiff.build` checks them."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    def settings(self) -> dict[str, Any]:
        """The constructor arguments."""
        return dict(self.model_extra or {})


class MaskingConfig(_Strict):
    """Random holes in the anchor: a fresh one whenever a row is visited in training, one per row in evaluation."""

    law: str = "squares"  # squares, box, half, checkerboard, free-form; mixed: one of them per row
    ratio: tuple[float, float] = (0.1, 0.75)  # range of the share of hidden pixels, or one number

    @field_validator("ratio", mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class EmbeddingConfig(_Strict):
    """Image embeddings by a frozen CLIP tower, computed once and cached."""

    model: str = "ViT-B-32"  # of open_clip
    pretrained: str | None = "laion2b_s34b_b79k"  # a tag of open_clip or a local checkpoint
    column: str = "image"  # what is embedded


class DataConfig(_Strict):
    """Where rows come from."""

    source: str  # an embedded set (digits, shapes), a hub name, a folder, or a parquet file or glob
    options: dict[str, Any] = {}  # arguments of the source: of an embedded set, or of `datasets.load_dataset`
    columns: dict[str, str] = {}  # {modality: column}; default: the column of the modality's own name
    masking: dict[str, MaskingConfig] = {}  # {modality: holes}: made from the anchor, not read from a column
    embeddings: dict[str, EmbeddingConfig] = {}  # {modality: encoder}: computed where the source lacks the column
    missing: dict[str, Share] = {}  # {modality: share of training rows whose value is hidden}
    split: str = "train"  # training rows
    validation_split: str = "validation"  # rows for evaluation
    holdout: int | None = Field(None, ge=2)  # k: hold out rows with index % k == k − 1 of `split` instead
    cache_mib: float = Field(512.0, ge=0)  # keep decoded rows in memory where they fit
    workers: int = Field(0, ge=0)  # processes that read rows


class WeightConfig(_Strict):
    """W_t of a modality (README, Theory, section 3)."""

    schedule: Literal["constant", "bump", "early", "none", "learned"] = "constant"
    scale: float = Field(1.5, ge=0)  # max_t W_t
    learn_scale: bool = False  # only with schedule learned


class ModalityStates(_Strict):
    """A modality's own probabilities, over those of `states`."""

    aggregated: float | None = Field(None, ge=0, le=1)
    observed: float | None = Field(None, ge=0, le=1)


class ModalityConfig(_Open):
    """One data type; further keys belong to its class."""

    kind: str  # a built-in modality, or an import path: my_pkg.depth:Depth
    weight: WeightConfig | None = None  # default: WeightConfig(), or none where the modality is never aggregated
    loss_weight: float = Field(0.1, ge=0)  # λ_i of the L2 term
    states: ModalityStates = ModalityStates()


class BackboneConfig(_Open):
    """The network; further keys belong to its class."""

    kind: str = "unet"


class SchedulerConfig(_Open):
    """The path from data to noise; further keys are arguments of the class that `kind` names."""

    kind: str = "diffusion"  # or flow_match
    num_train_timesteps: int = Field(1000, ge=2)
    clip_sample: bool | None = None  # default: where the anchor's encodings are bounded (pixels, not latents)
    clip_sample_range: float = Field(1.0, gt=0)
    solver: str = "DPMSolverMultistepScheduler"
    solver_config: dict[str, Any] | None = None


class StatesConfig(_Strict):
    """The law by which training draws each modality's state (README, Theory, section 4)."""

    # each_alone: at most one modality is observed; half_alone: so in half of the samples; source: always aggregated;
    # heads: always absent
    law: Literal["independent", "each_alone", "half_alone", "source", "heads"] = "independent"
    aggregated: float = Field(0.5, ge=0, le=1)  # probability of the flag, for auxiliary modalities
    observed: float = Field(0.3, ge=0, le=1)  # probability of the flag, for auxiliary modalities
    anchor_observed: float = Field(0.15, ge=0, le=1)  # the anchor is given, the rest is read from it
    anchor_hidden: float = Field(0.0, ge=0, le=1)  # nothing is denoised, the heads read from what else is observed


class LossConfig(_Strict):
    """How the terms are added up."""

    min_snr_gamma: float | None = Field(None, gt=0)  # cap of the SNR weighting of L1; none: plain
    uncertainty: bool = False  # L1 as a Gaussian's likelihood, its σ told by the network, instead of a plain error
    terminal: float = Field(1.0, ge=0)  # coefficient of L0

    @field_validator("uncertainty")
    @classmethod
    def _one_weighting(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("min_snr_gamma") is not None:
            raise ValueError("one weighting of L1 is enough; leave this or min_snr_gamma out")
        return value


class TrainConfig(_Strict):
    """One training run."""

    steps: int = Field(1000, ge=1)  # optimizer steps
    batch_size: int = Field(64, ge=1)  # global: over all processes and accumulated parts
    accumulate: int = Field(1, ge=1)  # parts into which each process splits its share
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    warmup: int = Field(50, ge=0)  # steps of linear warm-up; a cosine to 0 follows
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)  # reached from below: min(decay, (1 + n) / (10 + n))
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = Field(0, ge=0)
    threads: int = Field(0, ge=0)  # CPU threads; 0: from the CPU affinity
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(0, ge=0)  # 0: none but the last
    keep_checkpoints: int = Field(2, ge=1)
    sample_every: int = Field(0, ge=0)  # 0: only at the end
    resume: Literal["never", "auto"] = "never"  # auto: continue the run folder's newest checkpoint

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as False


class SampleConfig(_Strict):
    """How grids and evaluations sample."""

    steps: int = Field(20, ge=1)  # solver steps
    guidance_scale: float = Field(1.0, ge=0)  # classifier-free, of observed modalities; 1 is off
    guidance: dict[str, Scale] = {}  # {modality: scale}, over guidance_scale
    feed: Literal["draw", "mean", "mode"] | None = None  # unknown aggregated modalities; none: as fits the solver
    batch_size: int = Field(256, ge=1)

    def scales(self, observed: Iterable[str]) -> dict[str, float]:
        """{modality: guidance scale} of those that are observed."""
        return {name: self.guidance.get(name, self.guidance_scale) for name in observed}


class LpipsConfig(_Strict):
    """The perceptual distance."""

    net: Literal["alex", "vgg", "squeeze"] = "alex"
    backbone: str | None = None  # a local state dict of the backbone, instead of torchvision's own weights
    heads: str | None = None  # a local state dict of the heads, instead of those in the package


class ZeroShotConfig(_Strict):
    """CLIP zero-shot classification by open_clip."""

    model: str = "ViT-B-32"
    pretrained: str | None = "laion2b_s34b_b79k"
    names: list[str] | None = None  # of the classes; default: those of the data
    template: str = "a photo of a {}."


class EvaluateConfig(_Strict):
    """What `mmdiff evaluate` measures."""

    num_samples: int = Field(749, ge=2)
    seeds: list[int] = Field([0], min_length=1)
    at_end: bool = True  # whether training ends with an evaluation
    max_rows: int = Field(20_000, ge=2)  # real rows that judges and features are fitted on, and that are read off
    judges: dict[str, str] = {}  # {modality: run folder of a model that reads it off images, trained apart}
    features: str = "auto"  # of FID and KID: pixels, inception, a SqueezeNet file; auto: inception if it is here
    lpips: LpipsConfig = LpipsConfig()
    zero_shot: ZeroShotConfig | None = None  # a CLIP baseline for labels
    masks: dict[str, MaskingConfig] = {}  # {name: holes} to score masked images on; default: that of data.masking


class Config(_Strict):
    """One experiment."""

    name: str
    output: str | None = None  # run folder; default runs/<name>
    data: DataConfig
    anchor: str = "image"
    modalities: dict[str, ModalityConfig]
    backbone: BackboneConfig = BackboneConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    states: StatesConfig = StatesConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    track: Literal["none", "wandb"] = "none"

    @field_validator("name")
    @classmethod
    def _folder_name(cls, name: str) -> str:
        if not name or "/" in name or name.startswith("."):
            raise ValueError("must be usable as a folder name")
        return name

    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output or f"runs/{self.name}")

    def column(self, modality: str) -> str:
        """The data column of a modality."""
        return self.data.columns.get(modality, modality)

    def auxiliary(self) -> list[str]:
        """Names of all modalities but the anchor, sorted."""
        return sorted(set(self.modalities) - {self.anchor})


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `key=value` overrides and check everything.

    Raises:
        InputError: one line with the key, the value and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("config", str(path), "no such file")
    try:
        tree = OmegaConf.merge(OmegaConf.load(path), parse_overrides(overrides or []))
        plain = OmegaConf.to_container(tree, resolve=True)
    except InputError:
        raise
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise InputError("config", str(path), f"cannot be read: {error}") from error
    except Exception as error:  # yaml raises its own family
        raise InputError("config", str(path), f"is no valid YAML: {error}") from error
    return parse_config(plain)


def parse_overrides(items: list[str]) -> Any:
    """`key=value` texts as one tree.

    Raises:
        InputError: one line with the text and the remedy.
    """
    tree = OmegaConf.create()
    for item in items:
        if "=" not in item:
            raise InputError("override", item, "write key=value, for example train.steps=600")
        try:
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([item]))
        except Exception as error:  # yaml and omegaconf raise families of their own
            raise InputError("override", item, f"its value is no valid YAML: {error}") from None
    return tree


def parse_config(tree: Any) -> Config:
    """Check a plain tree of dicts and lists."""
    if not isinstance(tree, dict):
        raise InputError("config", tree, "must be a mapping of keys")
    try:
        config = Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise _readable(error.errors()[0], Config) from None
    if config.anchor not in config.modalities:
        raise InputError("anchor", config.anchor, f"choose one of modalities: {', '.join(sorted(config.modalities))}")
    for name in config.data.columns:
        if name not in config.modalities:
            raise InputError(f"data.columns.{name}", config.data.columns[name], "names no modality")
    return config


def parse_arguments(key: str, arguments: Mapping[str, tuple[Any, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a class, of the types that its constructor declares, over its defaults.

    Args:
        key: of the section.
        arguments: {name: (annotation, default)}.
        settings: what the config sets.

    Raises:
        InputError: on an unknown key, with the nearest known one, and on a wrong type.
    """
    model: Any = pydantic.create_model(key, __base__=_Strict, **arguments)
    try:
        return model.model_validate(settings).model_dump()
    except pydantic.ValidationError as error:
        found = _readable(error.errors()[0], model)
        raise InputError(f"{key}.{found.key}", found.value, found.remedy) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config; reading it gives the same config again."""
    OmegaConf.save(OmegaConf.create(config.model_dump(mode="json")), path)


def first_difference(one: Config, other: Config, ignore: set[str]) -> tuple[str, Any, Any] | None:
    """(key, value in one, value in other) of the first key in which two configs differ."""
    return _difference(one.model_dump(mode="json"), other.model_dump(mode="json"), "", ignore)


def _difference(one: Any, other: Any, key: str, ignore: set[str]) -> tuple[str, Any, Any] | None:
    if key in ignore:
        return None
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(set(one) | set(other)):
            found = _difference(one.get(name), other.get(name), f"{key}.{name}".lstrip("."), ignore)
            if found:
                return found
        return None
    return None if one == other else (key, one, other)


def _readable(error: Any, model: Any) -> InputError:
    """A pydantic error as our one line; unknown keys get the nearest known one."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(model, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        return InputError(
            key, error["input"], f"unknown key; {f'did you mean {near[0]}?' if near else 'known: ' + ', '.join(known)}"
        )
    if error["type"] == "missing":
        return InputError(key, None, "is missing; add it to the config")
    message = error["msg"].removeprefix("Value error, ")
    return InputError(key, error["input"], message[0].lower() + message[1:])


def _fields_at(model: Any, path: tuple) -> list[str]:
    """Names of the fields of the section of a model at a path of keys."""
    for part in path:
        model = get_args(model)[1] if get_origin(model) is dict else model.model_fields[part].annotation
        if get_origin(model) is UnionType:  # an optional section
            model = next(one for one in get_args(model) if one is not type(None))
    return sorted(model.model_fields)
