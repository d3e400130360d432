"""The config of an experiment: its schema, reading and writing. Nothing here imports torch."""

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
from mmdiff.config.schema import (
    Config,
    DataConfig,
    EvaluateConfig,
    MaskingConfig,
    ModalityConfig,
    SampleConfig,
    StatesConfig,
    TrainConfig,
    WeightConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "EvaluateConfig",
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
