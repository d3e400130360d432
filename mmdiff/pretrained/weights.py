"""The weights of a network of diffusers; only safetensors are read."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mmdiff.backbones import BACKBONES
from mmdiff.errors import InputError
from mmdiff.pretrained.source import KEY, Found, read_json
from mmdiff.trust import damage

_WEIGHTS = "diffusion_pytorch_model"
_INDEX = f"{_WEIGHTS}.safetensors.index.json"


def load_network(found: Found) -> nn.Module:
    """The network of diffusers with its weights, in float32.

    Raises:
        InputError: there are no safetensors, they do not fit the config, or a number in them is not finite.
    """
    assert found.network is not None
    name, part = found.network
    if Path(name).is_dir():
        _check_files(Path(name))
    cls = BACKBONES[found.kind].network_class
    with damage(KEY, name):
        network, info = cls.from_pretrained(
            name, subfolder=part, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    for words, key in (("lacks", "missing_keys"), ("has besides", "unexpected_keys")):
        if info[key]:
            raise InputError(KEY, name, f"its weights are not those of its config: it {words} {sorted(info[key])[0]}")
    for tensor_name, tensor in network.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise InputError(KEY, name, f"{tensor_name} is not finite")
    return network.float().eval()


def _check_files(folder: Path) -> None:
    """Only safetensors are read, and only files of the folder."""
    if not any(folder.glob(f"{_WEIGHTS}*.safetensors")):
        there = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        remedy = f"{there[0]} is a pickle, which can run code; save it again as safetensors" if there else "is no file"
        raise InputError(KEY, str(folder / f"{_WEIGHTS}.safetensors"), remedy)
    if (folder / _INDEX).is_file():
        shards = read_json(folder / _INDEX).get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else [None]:
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise InputError(KEY, str(folder / _INDEX), f"names {shard!r}, which is no file of the folder")
