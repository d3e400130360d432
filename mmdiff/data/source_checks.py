"""Checks before `datasets` opens a local source: options, scripts and pickles, members of tars, saved folders."""

from __future__ import annotations

import inspect
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mmdiff.errors import InputError

#: {builder: options of a local source}; other builders have none
OPTIONS: dict[str, tuple[str, ...]] = {
    "csv": (
        *("sep", "delimiter", "header", "names", "column_names", "usecols", "skiprows", "nrows", "encoding"),
        *("quotechar", "quoting", "escapechar", "comment", "decimal", "thousands"),
        *("na_values", "keep_default_na", "true_values", "false_values"),
    ),
    "json": ("field", "encoding"),
}
_REFUSED = {
    "data_files": "name the file, a glob or a list of files as data.source",
    "data_dir": "name the folder as data.source",
    "cache_dir": "set the variable HF_DATASETS_CACHE instead",
    "revision": "is for names of the hub; leave it out",
    "token": "is for names of the hub; leave it out",
    "storage_options": "is for other file systems; only local files are read",
}
_PICKLES = frozenset({".pkl", ".pickle", ".pt", ".pth"})
_CODE_BESIDE = _PICKLES | {".py"}
_CODE_MEMBERS = _PICKLES | {".pyd"}


def check_options(builder: str, options: Mapping[str, Any]) -> None:
    """Refuse options that the builder of a local source does not have."""
    known = OPTIONS.get(builder, ())
    for name, value in options.items():
        if name not in known:
            remedy = _REFUSED.get(name, f"is no option of this source; it has {', '.join(known) or 'none'}")
            raise InputError(f"data.options.{name}", value, remedy)


def check_arguments(source: str, loader: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options that an embedded data set does not have."""
    known = inspect.signature(loader).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for name, value in options.items():
        if name not in known:
            remedy = f"is no option of {source}; it has {', '.join(known) or 'none'}"
            raise InputError(f"data.options.{name}", value, remedy)


def check_files(source: str | list[str], files: Iterable[Path], members: bool = True) -> None:
    """Refuse a script or a pickle beside data, and a tar with a member that `check_member` refuses.

    Args:
        source: of the data.
        files: it has.
        members: look into tars.
    """
    for file in files:
        if file.suffix.lower() in _CODE_BESIDE:
            raise InputError("data.source", source, f"holds {file.name}; scripts and pickles are never run, remove it")
        if members and file.suffix.lower() == ".tar":
            _check_members(file)


def _check_members(file: Path) -> None:
    try:
        with tarfile.open(file) as tar:
            members = list(tar)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError("data.source", str(file), f"is no tar that can be read ({error})") from None
    for member in members:
        check_member(str(file), member)


def check_member(file: str, member: tarfile.TarInfo) -> None:
    """Refuse a pickle, a link or a path out of the tar."""
    name = member.name
    if ".." in Path(name).parts or "\\" in name or name.startswith("/"):
        raise InputError("data.source", file, f"names {name}, which leaves its folder; pack it again")
    if not (member.isfile() or member.isdir()):
        raise InputError("data.source", file, f"holds {name}, which is no file; pack the files themselves")
    if Path(name).suffix.lower() in _CODE_MEMBERS:
        raise InputError("data.source", file, f"holds the pickle {name}; pickles are never run, remove it")


def check_saved(folder: Path) -> None:
    """Refuse a folder of `save_to_disk` that names files outside it or another row format."""
    if (folder / "dataset_dict.json").is_file():
        for split in _listed(folder / "dataset_dict.json", "splits"):
            check_saved(_inside(folder, split))
        return
    for entry in _listed(folder / "state.json", "_data_files"):
        _inside(folder, entry.get("filename") if isinstance(entry, dict) else entry)
    kind = _read(folder / "state.json").get("_format_type")
    if kind is not None:
        remedy = f"was saved with the format {kind}; call reset_format() and save it again"
        raise InputError("data.source", str(folder), remedy)


def _inside(folder: Path, name: Any) -> Path:
    """A file or folder directly in ``folder``."""
    simple = isinstance(name, str) and name and ".." not in name and not {"/", "\\"} & set(name)
    if not simple or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise InputError("data.source", str(folder), f"names {name!r}, which is no file in it; save it again")
    return folder / name


def _listed(file: Path, key: str) -> list[Any]:
    entries = _read(file).get(key)
    if not isinstance(entries, list):
        raise InputError("data.source", str(file), f"has no list {key}; save the data set again")
    return entries


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError("data.source", str(file), f"cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise InputError("data.source", str(file), "is no description of a saved data set; save it again")
    return content
