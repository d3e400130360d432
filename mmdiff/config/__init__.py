"""The config of an experiment: its schema, reading and writing. Nothing here imports torch."""

from mmdiff.config.data import AugmentConfig, BucketsConfig, DataConfig, MaskingConfig
from mmdiff.config.evaluation import EvaluateConfig, SampleConfig
from mmdiff.config.load import (
    as_yaml,
    first_difference,
    load_config,
    parse_arguments,
    parse_config,
    parse_overrides,
    read_plain,
    save_config,
)
from mmdiff.config.model import ModalityConfig, WeightConfig
from mmdiff.config.schema import Config
from mmdiff.config.training import LoraConfig, StatesConfig, TrainConfig

__all__ = [
    "AugmentConfig",
    "BucketsConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "LoraConfig",
    "MaskingConfig",
    "ModalityConfig",
    "SampleConfig",
    "StatesConfig",
    "TrainConfig",
    "WeightConfig",
    "as_yaml",
    "first_difference",
    "load_config",
    "parse_arguments",
    "parse_config",
    "parse_overrides",
    "read_plain",
    "save_config",
]
