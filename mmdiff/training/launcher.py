"""What `accelerate launch` was asked for, by flags or its YAML file (experiments/accelerate), as settings of a run."""

from __future__ import annotations

import argparse
import os

import psutil
from pydantic import ValidationError

from mmdiff.config import Config, TrainConfig
from mmdiff.errors import InputError

_REFUSED = {  # {environment of `accelerate launch`: (flag, what means that nobody asked)}
    "ACCELERATE_DYNAMO_BACKEND": ("--dynamo_backend", "no"),
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", "false"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("--use_parallelism_config", "false"),
    "ACCELERATE_GRADIENT_CLIPPING": ("--gradient_clipping", "none"),
}
_ONLY = {  # {environment of a launcher that shards: (train.sharding, {environment: (flag, values it may have)})}
    "ACCELERATE_USE_FSDP": (
        "fsdp2",
        {
            "FSDP_VERSION": ("--fsdp_version", ("2",)),
            "FSDP_RESHARD_AFTER_FORWARD": ("--fsdp_reshard_after_forward", ("true", "full_shard")),
            "FSDP_OFFLOAD_PARAMS": ("--fsdp_offload_params", ("false",)),
            "FSDP_ACTIVATION_CHECKPOINTING": ("--fsdp_activation_checkpointing", ("false",)),
        },
    ),
    "ACCELERATE_USE_DEEPSPEED": (
        "zero2",
        {
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("--zero_stage", ("2",)),
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("--offload_optimizer_device", ("none",)),
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("--offload_param_device", ("none",)),
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("--deepspeed_config_file", ("none",)),
        },
    ),
}


def obey_launcher(config: Config) -> Config:
    """The config with what `accelerate launch` was asked for where the config leaves the key out.

    Raises:
        InputError: the two contradict each other, or the launcher was asked for what mmdiff does not do.
    """
    for name, (flag, unasked) in _REFUSED.items():
        if (value := os.environ.get(name, unasked)).lower() not in (unasked, ""):
            raise InputError(f"accelerate launch {flag}", value, "is not supported; leave it out")
    asked = _asked()
    for key in asked.keys() & config.train.model_fields_set:
        if (own := getattr(config.train, key)) != asked[key]:
            remedy = f"but `accelerate launch` was asked for {asked[key]!r}; leave one of them out"
            raise InputError(f"train.{key}", own, remedy)
    tree = config.train.model_dump() | asked
    try:
        return config.model_copy(update={"train": TrainConfig.model_validate(tree)}) if asked else config
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise InputError(f"accelerate launch: {key}", asked[key], error.errors()[0]["msg"]) from None


def _asked() -> dict[str, str | int]:
    """{key of `train`: what `accelerate launch` was asked for}; "no" and 1 stand there unasked."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if "ACCELERATE_MIXED_PRECISION" in os.environ and steps == "1":
        steps = _parent_flag("gradient_accumulation_steps") or steps  # not in the environment without DeepSpeed
    try:
        asked = {"mixed_precision": precision, "accumulate": int(steps)}
    except ValueError:
        raise InputError("accelerate launch --gradient_accumulation_steps", steps, "must be a whole number") from None
    asked["sharding"] = _sharding()
    return {key: value for key, value in asked.items() if value not in ("no", 1, "none")}


def _sharding() -> str:
    """`train.sharding` that the launcher was asked for. The run shards by itself: Accelerate only starts processes.

    Raises:
        InputError: for an option of FSDP or DeepSpeed that has another value than the run can give it.
    """
    asked = "none"
    for name, (kind, options) in _ONLY.items():
        if os.environ.get(name, "false").lower() != "true":
            continue
        for variable, (flag, able) in options.items():
            if (value := os.environ.get(variable, able[0])).lower() not in able:
                raise InputError(f"accelerate launch {flag}", value, f"is not supported; set {able[0]}")
        asked, os.environ[name] = kind, "false"
    return asked


def _parent_flag(name: str) -> str | None:
    """What the command line of the launcher, which is this process's parent, says."""
    try:
        arguments = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    return vars(parser.parse_known_args(arguments)[0])[name]
