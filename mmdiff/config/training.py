"""States, loss terms and the training run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from mmdiff.config.base import Decay, Seed, Strict


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
    # of rows that denoise: probability that all diffused modalities have the anchor's noise level
    equal_time: float = Field(0.3, ge=0, le=1)
    # probability that a diffused modality has a noise level of its own, of the other rows that do not observe it; where
    # the anchor is observed it is 0.5
    own_time: float = Field(0.6, ge=0, le=1)


class RepaConfig(Strict):
    """Representation alignment with a frozen image encoder (docs/theory.md, section 8)."""

    # of open_clip: a name, hf-hub:NAME or local-dir:FOLDER; or timm:NAME
    model: str = "ViT-B-32"
    # tag of its weights, or a local file; null with hf-hub: and local-dir:, and for the weights that timm names
    pretrained: str | None = "laion2b_s34b_b79k"
    weight: float = Field(0.5, ge=0, le=1e6)  # coefficient of the term
    # number of the backbone's block whose output is aligned; none: the features that pixel heads read
    layer: int | None = Field(None, ge=0, le=10_000)
    until: int = Field(0, ge=0, le=10**9)  # the step from which the term is gone; 0: it stays
    teacher: Literal["own", "shuffled"] = "own"  # shuffled, a control: the encoder sees the neighbour's image


class LossConfig(Strict):
    """Weights of the loss terms."""

    # learned: a weight per modality that is trained, from loss_weight on (docs/theory.md, section 8)
    weighting: Literal["fixed", "learned"] = "fixed"
    min_snr_gamma: float | None = Field(None, gt=0, le=1e9)  # cap of the SNR weight of L1; none: no weight
    uncertainty: bool = False  # L1 as a Gaussian likelihood whose σ the network predicts, instead of a squared error
    terminal: float = Field(1.0, ge=0, le=1e6)  # coefficient of L0
    # λ of contrastive flow matching: how far a velocity is pushed off another sample's; 0: off, published: 0.05
    contrastive: float = Field(0.0, ge=0, lt=1)
    repa: RepaConfig | None = None  # align the backbone's features with those of an encoder

    @field_validator("uncertainty", "contrastive")
    @classmethod
    def _one_weighting(cls, value: bool | float, info: ValidationInfo) -> bool | float:
        before = info.data
        if info.field_name == "uncertainty" and value and before.get("min_snr_gamma") is not None:
            raise ValueError("one weighting of L1 is enough; leave this or min_snr_gamma out")
        if info.field_name == "uncertainty" and value and before.get("weighting") == "learned":
            raise ValueError("one weighting of L1 is enough; leave this out or set weighting: fixed")
        if info.field_name == "contrastive" and value and before.get("uncertainty"):
            raise ValueError("loss.uncertainty makes a likelihood of the error that this subtracts from; leave one out")
        return value


class LoraConfig(Strict):
    """Low-rank adapters on a pretrained network, which stays as it is (Hu et al., 2021)."""

    rank: int = Field(8, ge=1, le=2**16)  # r of W + (α / r) B A
    alpha: float | None = Field(None, gt=0, le=2**16)  # α; default: rank
    targets: list[str] | None = None  # ends of the names of linear layers: to_q; default: all of attention
    only_adapters: bool = False  # leave the parts through which modalities enter and are read as they are, too


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
    ema_further_decays: list[Decay] = []  # of averages that are kept beside it, for `mmdiff ema`
    # relative widths of power-function averages, from whose snapshots `mmdiff ema` makes any width: [0.05, 0.1]
    ema_sigma_rel: list[Annotated[float, Field(ge=1e-3, le=0.28)]] = []
    ema_snapshot_every: int = Field(0, ge=0, le=10**9)  # steps between these snapshots; 0: only the last
    ema_snapshot_dtype: Literal["float32", "float16"] = "float32"  # of the snapshots' files
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # precision of the forward and backward pass
    compile: bool = False  # compile the backbone's blocks by torch.compile; the first steps take minutes
    # how the state lies on several processes: whole on each (DDP), or in parts (FSDP2, DeepSpeed's ZeRO-2)
    sharding: Literal["none", "fsdp2", "zero2"] = "none"
    seed: Seed = 0  # of weights, noise, times, states and the order of rows
    threads: int = Field(0, ge=0, le=1024)  # CPU threads; 0: as many as the CPU affinity allows
    log_every: int = Field(10, ge=1, le=10**9)  # steps between lines of metrics.jsonl
    # steps between measurements of the gradient of every loss term, a multiple of log_every; 0: never
    gradients_every: int = Field(0, ge=0, le=10**9)
    checkpoint_every: int = Field(0, ge=0, le=10**9)  # steps between checkpoints; 0: only the last
    keep_checkpoints: int = Field(2, ge=1, le=10**9)  # how many of the newest are kept
    sample_every: int = Field(0, ge=0, le=10**9)  # steps between sample grids; 0: only at the end
    # never; auto: continue the newest checkpoint; a run or checkpoint folder: continue it in a new run folder
    resume: str = "never"
    initialize_from: str | None = None  # a pipeline, run or checkpoint folder; weights that fit are taken from it
    lora: LoraConfig | None = None  # train low-rank adapters and the modalities' own parts instead of the whole network

    @field_validator("gradients_every")
    @classmethod
    def _with_a_line(cls, value: int, info: ValidationInfo) -> int:
        if value % info.data.get("log_every", 1):
            raise ValueError(f"must be a multiple of log_every = {info.data['log_every']}, whose lines it joins")
        return value

    @field_validator("min_learning_rate")
    @classmethod
    def _below_the_highest(cls, value: float, info: ValidationInfo) -> float:
        if value and str(info.data.get("lr_scheduler_type")).startswith("constant"):
            raise ValueError("a constant learning rate never gets there; choose lr_scheduler_type linear or cosine")
        if value > info.data.get("learning_rate", value):
            raise ValueError(f"is above learning_rate = {info.data['learning_rate']}")
        return value

    @field_validator("ema_further_decays", "ema_sigma_rel")
    @classmethod
    def _each_once(cls, value: list[float], info: ValidationInfo) -> list[float]:
        first = [info.data.get("ema_decay")] if info.field_name == "ema_further_decays" else []
        if len({*first, *value}) < len(first) + len(value):
            raise ValueError("names one average twice")
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
