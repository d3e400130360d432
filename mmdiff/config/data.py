"""Where rows come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from mmdiff.config.base import Share, Strict

Range = tuple[float, float]
Side = Annotated[int, Field(ge=1, le=2**16)]
_BOUNDS = {"crop": (1e-3, 1.0), "crop_ratio": (0.1, 10.0), "hue": (-0.5, 0.5)}
_BOUNDS |= dict.fromkeys(("brightness", "contrast", "saturation"), (0.0, 10.0))


class MaskingConfig(Strict):
    """Random holes in the anchor: a new one at every visit of a row in training, one per row in evaluation."""

    pattern: str = "squares"  # squares, box, half, checkerboard, free-form; mixed: one of these per row
    ratio: tuple[Share, Share] = (0.1, 0.75)  # share of hidden pixels, one number or a range

    @field_validator("ratio", mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        return (value, value) if _is_number(value) else value


class EmbeddingConfig(Strict):
    """Image embeddings by a frozen CLIP tower, computed once and cached."""

    model: str = "ViT-B-32"  # name of the model in open_clip
    pretrained: str | None = "laion2b_s34b_b79k"  # tag of its weights in open_clip, or a local checkpoint
    column: str = "image"  # column of the images


class AugmentConfig(Strict):
    """Random changes of training rows, the same for the image and all that has a place in it; none by default."""

    flip: Share = 0.0  # probability that left and right are exchanged
    vertical_flip: Share = 0.0  # probability that top and bottom are exchanged
    crop: Range = (1.0, 1.0)  # share of the area that is kept and brought back to the size, a range or one number
    crop_ratio: Range = (1.0, 1.0)  # width over height of what is kept, relative to the image's; 1: no distortion
    brightness: Range = (1.0, 1.0)  # factor, a range or one number x for 1 ± x
    contrast: Range = (1.0, 1.0)  # the same
    saturation: Range = (1.0, 1.0)  # the same
    hue: Range = (0.0, 0.0)  # turn of the colours as a part of the colour circle, a range or one number x for ± x
    unchanged: list[str] = []  # modalities that stay as they are

    @field_validator("crop", "crop_ratio", mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        return (value, value) if _is_number(value) else value

    @field_validator("brightness", "contrast", "saturation", mode="before")
    @classmethod
    def _around_one(cls, value: Any) -> Any:
        return (max(0, 1 - value), 1 + value) if _is_number(value) and value >= 0 else value

    @field_validator("hue", mode="before")
    @classmethod
    def _around_zero(cls, value: Any) -> Any:
        return (-value, value) if _is_number(value) and value >= 0 else value

    @field_validator("crop", "crop_ratio", "brightness", "contrast", "saturation", "hue")
    @classmethod
    def _in_bounds(cls, value: Range, info: ValidationInfo) -> Range:
        least, most = _BOUNDS[info.field_name or ""]
        if not least <= value[0] <= value[1] <= most:
            raise ValueError(f"needs a range low ≤ high from {least:g} to {most:g}")
        return value

    @property
    def moves(self) -> bool:
        """Whether anything changes its place."""
        return self.flip > 0 or self.vertical_flip > 0 or self.crop != (1.0, 1.0)

    @property
    def colours(self) -> list[str]:
        """The colours that change."""
        still = {"brightness": (1.0, 1.0), "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": (0.0, 0.0)}
        return [name for name, value in still.items() if getattr(self, name) != value]


class BucketsConfig(Strict):
    """Sizes at which training reads images of several shapes; every global batch has one of them."""

    # (height, width) in pixels; default: generated, with about as many pixels as the image's own size
    sizes: list[tuple[Side, Side]] | None = Field(None, min_length=1)
    ratio: float = Field(2.0, ge=1, le=100)  # of generated sizes: the longer side over the shorter one, at most
    multiple: Side | None = None  # of generated sizes: of their heights and widths; default: what the backbone needs

    @field_validator("ratio", "multiple")
    @classmethod
    def _of_generated_sizes(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("sizes") is not None and value != cls.model_fields[info.field_name or ""].default:
            raise ValueError("is of generated sizes, and sizes are given; leave one out")
        return value


class DataConfig(Strict):
    """Where rows come from."""

    # a built-in set (digits, shapes, folders …), a file, a glob or a list of them, a folder, or a hub name
    source: str | list[str]
    options: dict[str, Any] = {}  # arguments of a built-in set, or of `datasets.load_dataset`
    columns: dict[str, str] = {}  # {modality: column}; default: the column of the modality's name
    masking: dict[str, MaskingConfig] = {}  # {modality: holes}: made from the anchor, not read from a column
    embeddings: dict[str, EmbeddingConfig] = {}  # {modality: encoder}: computed if the source lacks the column
    one_of: list[str] = []  # modalities whose column holds lists: training draws one item at every visit of a row
    augment: AugmentConfig = AugmentConfig()
    buckets: BucketsConfig | None = None
    missing: dict[str, Share] = {}  # {modality: share of training rows whose value is hidden}
    split: str = "train"  # name of the training split
    validation_split: str = "validation"  # name of the held-out split
    holdout: int | None = Field(None, ge=2, lt=2**31)  # k: hold out every k-th row of `split` instead
    cache_mib: float = Field(512.0, ge=0, le=1e9)  # keep decoded rows in memory if they fit into this many MiB
    workers: int = Field(0, ge=0, le=1024)  # processes that read rows
    streaming: bool = False  # read parquet, arrow and tar shards where they lie: nothing is copied or kept in memory
    streams: int = Field(32, ge=1, le=65_536)  # of a streamed data set: a batch comes from at most so many places of it
    on_error: Literal["raise", "skip"] = "raise"  # skip: a value that cannot be used counts as missing
    max_errors: Share = 0.01  # largest share of rows with such a value; more stop the run

    @field_validator("source", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        several = value if isinstance(value, list) and value else [value]
        if not all(isinstance(one, str) and one.strip() for one in several):
            raise ValueError("name a source, or a list of files")
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
