"""The config of an experiment: a pydantic model for every section; unknown keys are errors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from mmdiff.errors import printable

Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(ge=0, le=1e4)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
_NUMBERS = (int, float, int | None, float | None)


def folder_name(name: str) -> str:
    """Refuse names with separators or control characters, and hidden ones."""
    if not name or set(name) & set("/\\") or name.startswith(".") or len(name) > 200 or printable(name) != name:
        raise ValueError("must be usable as a folder name: no slashes, no control characters, no dot in front")
    return name


FolderName = Annotated[str, AfterValidator(folder_name)]


class _Base(BaseModel):
    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation in _NUMBERS:
            raise ValueError("must be a number")
        return value


class Strict(_Base):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Open(_Base):
    """Further keys are constructor arguments of the class that `kind` names; `mmdiff.resolve` checks them."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    def settings(self) -> dict[str, Any]:
        """The further keys."""
        return dict(self.model_extra or {})


class MaskingConfig(Strict):
    """Random holes in the anchor: a new one at every visit of a row in training, one per row in evaluation."""

    pattern: str = "squares"  # squares, box, half, checkerboard, free-form; mixed: one of these per row
    ratio: tuple[Share, Share] = (0.1, 0.75)  # share of hidden pixels, one number or a range

    @field_validator("ratio", mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class EmbeddingConfig(Strict):
    """Image embeddings by a frozen CLIP tower, computed once and cached."""

    model: str = "ViT-B-32"  # name of the model in open_clip
    pretrained: str | None = "laion2b_s34b_b79k"  # tag of its weights in open_clip, or a local checkpoint
    column: str = "image"  # column of the images


class DataConfig(Strict):
    """Where rows come from."""

    # a built-in set (digits, shapes, folders …), a file, a glob or a list of them, a folder, or a hub name
    source: str | list[str]
    options: dict[str, Any] = {}  # arguments of a built-in set, or of `datasets.load_dataset`
    columns: dict[str, str] = {}  # {modality: column}; default: the column of the modality's name
    masking: dict[str, MaskingConfig] = {}  # {modality: holes}: made from the anchor, not read from a column
    embeddings: dict[str, EmbeddingConfig] = {}  # {modality: encoder}: computed if the source lacks the column
    missing: dict[str, Share] = {}  # {modality: share of training rows whose value is hidden}
    split: str = "train"  # name of the training split
    validation_split: str = "validation"  # name of the held-out split
    holdout: int | None = Field(None, ge=2, lt=2**31)  # k: hold out every k-th row of `split` instead
    cache_mib: float = Field(512.0, ge=0, le=1e9)  # keep decoded rows in memory if they fit into this many MiB
    workers: int = Field(0, ge=0, le=1024)  # processes that read rows
    on_error: Literal["raise", "skip"] = "raise"  # skip: a value that cannot be used counts as missing
    max_errors: Share = 0.01  # largest share of rows with such a value; more stop the run

    @field_validator("source", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        several = value if isinstance(value, list) and value else [value]
        if not all(isinstance(one, str) and one.strip() for one in several):
            raise ValueError("name a source, or a list of files")
        return value


class WeightConfig(Strict):
    """W_t of a modality (docs/theory.md, section 3)."""

    schedule: Literal["constant", "bump", "early", "none", "learned"] = "constant"  # how W_t depends on t
    scale: float = Field(1.5, ge=0, le=1e4)  # max_t W_t
    learn_scale: bool = False  # train the scale too; only with schedule learned


class ModalityStates(Strict):
    """A modality's probabilities, which replace those of `states`."""

    aggregated: float | None = Field(None, ge=0, le=1)  # probability of the flag
    observed: float | None = Field(None, ge=0, le=1)  # probability of the flag


class ModalityConfig(_Open):
    """One data type; further keys belong to its class."""

    kind: str  # a built-in modality, or an import path: my_pkg.depth:Depth
    weight: WeightConfig | None = None  # default: WeightConfig(); schedule none if the modality is never aggregated
    loss_weight: float = Field(0.1, ge=0, le=1e6)  # λ_i, coefficient of the L2 term
    states: ModalityStates = ModalityStates()


class BackboneConfig(_Open):
    """The network; further keys belong to its class."""

    kind: str = "unet"  # the network


class SchedulerConfig(_Open):
    """The path from data to noise; further keys are arguments of the class that `kind` names."""

    kind: str = "diffusion"  # diffusion, or flow_match
    num_train_timesteps: int = Field(1000, ge=2, le=100_000)  # T
    # clip the predicted z_0; default: if the anchor's encodings are bounded (pixels, not latents)
    clip_sample: bool | None = None
    clip_sample_range: float = Field(1.0, gt=0, le=1e4)  # to ± this value
    solver: str = "DPMSolverMultistepScheduler"  # class of diffusers that takes the steps
    solver_config: dict[str, Any] | None = None  # its own options, such as eta of DDIM


class StatesConfig(Strict):
    """The distribution of each modality's state in training (docs/theory.md, section 4)."""

    # how the flags of all modalities are drawn together
    distribution: Literal["independent", "each_alone", "half_alone", "source", "heads"] = "independent"
    aggregated: float = Field(0.5, ge=0, le=1)  # probability of the flag, for auxiliary modalities
    observed: float = Field(0.3, ge=0, le=1)  # probability of the flag, for auxiliary modalities
    # probability that the anchor is observed and the heads read from it
    anchor_observed: float = Field(0.15, ge=0, le=1)
    # probability that nothing is denoised and the heads read from the other conditions
    anchor_hidden: float = Field(0.0, ge=0, le=1)


class LossConfig(Strict):
    """Weights of the loss terms."""

    min_snr_gamma: float | None = Field(None, gt=0, le=1e9)  # cap of the SNR weight of L1; none: no weight
    uncertainty: bool = False  # L1 as a Gaussian likelihood whose σ the network predicts, instead of a squared error
    terminal: float = Field(1.0, ge=0, le=1e6)  # coefficient of L0

    @field_validator("uncertainty")
    @classmethod
    def _one_weighting(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("min_snr_gamma") is not None:
            raise ValueError("one weighting of L1 is enough; leave this or min_snr_gamma out")
        return value


class TrainConfig(Strict):
    """One training run."""

    steps: int = Field(1000, ge=1, le=10**9)  # optimizer steps
    batch_size: int = Field(64, ge=1, le=10**7)  # global: over all processes and accumulated parts
    accumulate: int = Field(1, ge=1, le=10**7)  # parts into which each process splits its share of a batch
    # muon: orthogonalised momentum for the backbone's matrices, AdamW for the rest
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0, le=1e9)  # the highest value
    # what follows the warm-up; constant has no warm-up
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    warmup: int = Field(50, ge=0, le=10**9)  # steps of linear warm-up
    min_learning_rate: float = Field(0.0, ge=0, le=1e9)  # final value of linear and cosine
    betas: tuple[Decay, Decay] = (0.9, 0.99)  # of AdamW
    weight_decay: float = Field(0.01, ge=0, le=100)  # decoupled, as in AdamW
    max_grad_norm: float = Field(1.0, gt=0, le=1e9)  # gradients are clipped to this norm
    ema_decay: float = Field(0.999, ge=0, lt=1)  # of the averaged weights; step n uses min(decay, (1 + n) / (10 + n))
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # precision of the forward and backward pass
    seed: Seed = 0  # of weights, noise, times, states and the order of rows
    threads: int = Field(0, ge=0, le=1024)  # CPU threads; 0: as many as the CPU affinity allows
    log_every: int = Field(10, ge=1, le=10**9)  # steps between lines of metrics.jsonl
    checkpoint_every: int = Field(0, ge=0, le=10**9)  # steps between checkpoints; 0: only the last
    keep_checkpoints: int = Field(2, ge=1, le=10**9)  # how many of the newest are kept
    sample_every: int = Field(0, ge=0, le=10**9)  # steps between sample grids; 0: only at the end
    # never; auto: continue the newest checkpoint; a run or checkpoint folder: continue it in a new run folder
    resume: str = "never"
    initialize_from: str | None = None  # a pipeline, run or checkpoint folder; weights that fit are taken from it

    @field_validator("min_learning_rate")
    @classmethod
    def _below_the_highest(cls, value: float, info: ValidationInfo) -> float:
        if value and str(info.data.get("lr_scheduler_type")).startswith("constant"):
            raise ValueError("a constant learning rate never gets there; choose lr_scheduler_type linear or cosine")
        if value > info.data.get("learning_rate", value):
            raise ValueError(f"is above learning_rate = {info.data['learning_rate']}")
        return value

    @field_validator("initialize_from")
    @classmethod
    def _one_origin(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("resume") not in ("never", "auto"):
            raise ValueError("a run starts from one folder; leave this or resume=FOLDER out")
        return value

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as False


class SampleConfig(Strict):
    """Sampling of grids and evaluations."""

    steps: int = Field(20, ge=1, le=100_000)  # solver steps
    guidance_scale: float = Field(1.0, ge=0, le=1e4)  # classifier-free, of observed modalities; 1 is off
    guidance: dict[str, Scale] = {}  # {modality: scale}, over guidance_scale
    # of unknown aggregated modalities; none: as fits the solver
    feedback: Literal["draw", "mean", "mode"] | None = None
    batch_size: int = Field(256, ge=1, le=10**7)  # samples that are computed at once

    def scales(self, observed: Iterable[str]) -> dict[str, float]:
        """{observed modality: guidance scale}."""
        return {name: self.guidance.get(name, self.guidance_scale) for name in observed}


class LpipsConfig(Strict):
    """The perceptual distance."""

    net: Literal["alex", "vgg", "squeeze"] = "alex"  # network of the distance
    backbone: str | None = None  # a local state dict of the network, instead of torchvision's weights
    heads: str | None = None  # a local state dict of the linear heads, instead of those in the package


class ZeroShotConfig(Strict):
    """CLIP zero-shot classification by open_clip."""

    model: str = "ViT-B-32"  # name of the model in open_clip
    pretrained: str | None = "laion2b_s34b_b79k"  # tag of its weights, or a local checkpoint
    names: list[str] | None = None  # of the classes; default: those of the data
    template: str = "a photo of a {}."  # text for a class; {} is its name


class EvaluateConfig(Strict):
    """What `mmdiff evaluate` measures."""

    num_samples: int = Field(749, ge=2, le=10**8)  # samples per direction
    seeds: list[Seed] = Field([0], min_length=1)  # one evaluation each
    at_end: bool = True  # evaluate when training ends
    max_rows: int = Field(20_000, ge=2, le=10**9)  # real rows that judges and features use
    judges: dict[str, str] = {}  # {modality: run folder of a separately trained model that reads it from images}
    # of FID and KID: pixels, inception, or a SqueezeNet file; auto: inception if its weights are here
    features: str = "auto"
    lpips: LpipsConfig = LpipsConfig()
    zero_shot: ZeroShotConfig | None = None  # a CLIP baseline for labels
    masking: dict[FolderName, MaskingConfig] = {}  # {name: holes} of masked images; default: that of data.masking


class Config(Strict):
    """One experiment."""

    name: str  # of the experiment
    output: str | None = None  # run folder; default: runs/<name>
    data: DataConfig
    anchor: str = "image"  # the modality that is diffused
    modalities: dict[str, ModalityConfig]
    backbone: BackboneConfig = BackboneConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    states: StatesConfig = StatesConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    track: Literal["none", "wandb"] = "none"  # where metrics are sent beside metrics.jsonl

    @field_validator("name")
    @classmethod
    def _folder_name(cls, name: str) -> str:
        return folder_name(name)

    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output or f"runs/{self.name}")

    def column(self, modality: str) -> str:
        """The data column of a modality."""
        return self.data.columns.get(modality, modality)

    def auxiliary(self) -> list[str]:
        """Names of all modalities but the anchor, sorted."""
        return sorted(set(self.modalities) - {self.anchor})
