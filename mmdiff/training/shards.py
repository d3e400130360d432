"""Tensors that lie in parts on several processes, as safetensors files of torch.distributed.checkpoint: every process
writes its own parts, and any number of processes reads them. Nothing is pickled."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from mmdiff.training.sealed import DamagedError

NAME = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this process's parts; every process must call it.

    Args:
        folder: that exists.
        tensors: DTensors, and tensors that are the same on every process.

    Raises:
        Exception: what any process met, on all of them.
    """
    try:
        dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill this process's parts in place; every process must call it."""
    dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))


def shapes(folder: Path) -> dict[str, Tensor]:
    """{name: a tensor without values} of everything in a folder.

    Raises:
        DamagedError: the files cannot be read.
    """
    try:
        entries = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # whatever damaged headers lead to
        raise DamagedError(f"its shards cannot be read, {error}") from None
    return {name: torch.empty(one.size, dtype=one.properties.dtype, device="meta") for name, one in entries.items()}


def read_whole(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors under ``prefix``, put together on this process alone; names without it."""
    whole = {n: torch.empty_like(t, device="cpu") for n, t in shapes(folder).items() if n.startswith(prefix)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it reads alone
        dcp.load(whole, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in whole.items()}


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_like(own: Tensor, full: Tensor) -> Tensor:
    """This process's part of a whole tensor, laid out like another one."""
    full = full.to(device=own.device, dtype=own.dtype)
    if not isinstance(own, DTensor):
        return full
    return distribute_tensor(full, own.device_mesh, own.placements, src_data_rank=None)
