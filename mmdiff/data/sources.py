"""Sources of rows: embedded data sets, local files and folders, and data sets of the Hugging Face hub."""

from __future__ import annotations

import functools
import glob
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
from pandas.errors import EmptyDataError

from mmdiff.data import abo, digits, folders, image_sets, mnist_svhn, polymnist, textured_digits
from mmdiff.data.shapes import image_sets as shape_sets
from mmdiff.data.source_checks import check_arguments, check_files, check_options, check_saved
from mmdiff.data.streamed import Rest, StreamedRows, open_streamed
from mmdiff.data.table import ROW, Rows
from mmdiff.errors import InputError
from mmdiff.image_files import is_image

#: {suffix: (builder of `datasets`, its arguments)}: other builders may run code or unpickle
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".tar": ("webdataset", {}),
}
_HUB_BUILDERS = {*(builder for builder, _ in BUILDERS.values()), "imagefolder"}
_HUB_STREAMED = ("name", "revision", "data_dir", "data_files", "token")  # options that say which files
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_NAME = re.compile(r".*[^./]\.[A-Za-z]{1,5}", re.DOTALL)  # not name-v1.0
_NO_OPTION = re.compile(r"(?:doesn't have a|unexpected keyword argument) '(\w+)'")  # error texts of the builders
_EMPTY = (StopIteration, EmptyDataError)  # errors of the builders for an empty file
_ASKED = "is a hub name, not a local path; to load it pass --trust-custom-modalities"
_REFUSED = {  # options of `datasets.load_dataset`
    "split": "set data.split instead",
    "streaming": "set data.streaming instead",
    "trust_remote_code": "code of a data set is never run; leave it out",
    "num_proc": "is not needed; leave it out",
}


Source = str | list[str]


def _image_sets(hub: bool, /, source: str, **options: Any) -> Mapping[str, Rows]:
    """Any other source as image sets, see `mmdiff.data.image_sets.load`."""
    if not isinstance(source, str):
        raise InputError("data.options.source", source, "needs a path or a name as text")
    check_arguments("image_sets", image_sets.load, options)
    return image_sets.load(load(source, {}, hub), **options)


EMBEDDED: dict[str, Callable[..., Mapping[str, Rows]]] = {
    "abo": abo.load,
    "image_sets": functools.partial(_image_sets, True),
    "digits": digits.load,
    "folders": folders.load,
    "mnist_svhn": mnist_svhn.load,
    "polymnist": polymnist.load,
    "shapes": shape_sets.load,
    "textured_digits": textured_digits.load,
}


_KINDS = ", ".join(BUILDERS)
_KNOWN = f"embedded sets: {', '.join(EMBEDDED)}; or a folder, a file of {_KINDS}, a list of these, a hub name"


def open_splits(
    source: Source,
    split: str = "train",
    validation_split: str = "validation",
    holdout: int | None = None,
    options: Mapping[str, Any] | None = None,
    hub: bool = True,
    streams: int = 0,
) -> tuple[Rows, Rows]:
    """The training rows and the held-out rows of a source.

    Args:
        source: a key of `EMBEDDED`; a local file or glob with a suffix of `BUILDERS`, or a list of them; a folder (of
            such files, of images, or saved by `datasets`); or a hub name.
        split, validation_split: names of the two splits.
        holdout: k; instead of a validation split hold out the training rows with index % k == k − 1.
        options: arguments of the embedded set, or of `datasets.load_dataset`.
        hub: whether a name that is no local path may be loaded from the hub.
        streams: of `mmdiff.data.streamed.StreamedRows`; 0: rows are not streamed.

    Raises:
        InputError: naming data.source, data.options, data.streaming, data.split, data.validation_split or data.holdout.
    """
    splits = load(source, dict(options or {}), hub, streams)
    if split not in splits:
        raise InputError("data.split", split, f"the source has the splits {', '.join(splits)}")
    if isinstance(splits[split], datasets.Dataset | StreamedRows) and ROW in splits[split].features:
        raise InputError("data.source", source, f"has a column {ROW}, a name that mmdiff uses itself; rename it")
    if holdout is not None:
        _refuse_empty("split", split, splits)
        return _held_out(splits[split], holdout)
    if validation_split not in splits:
        remedy = f"the source has the splits {', '.join(splits)}; name one, or hold out rows with data.holdout=10"
        raise InputError("data.validation_split", validation_split, remedy)
    for key, name in (("split", split), ("validation_split", validation_split)):
        _refuse_empty(key, name, splits)
    return splits[split], splits[validation_split]


def _refuse_empty(key: str, name: str, splits: Mapping[str, Rows]) -> None:
    if not len(splits[name]):
        sizes = ", ".join(f"{name} {len(rows)}" for name, rows in splits.items())
        raise InputError(f"data.{key}", name, f"has no rows; rows by split: {sizes}")


def _held_out(rows: Rows, holdout: int) -> tuple[Rows, Rows]:
    held_out, kept = range(holdout - 1, len(rows), holdout), Rest(len(rows), holdout)
    if not len(held_out) or not len(kept):
        remedy = f"leaves {len(held_out)} held-out rows of {len(rows)}; take a number from 2 to {len(rows)}"
        raise InputError("data.holdout", holdout, remedy)
    if isinstance(rows, StreamedRows):
        return rows.select(kept), rows.select(held_out)
    if isinstance(rows, datasets.Dataset):
        rows = rows.add_column(ROW, list(range(len(rows))))  # errors name a row by its number in the source
    return rows.select(list(kept)), rows.select(list(held_out))


def load(source: Source, options: dict[str, Any], hub: bool = True, streams: int = 0) -> Mapping[str, Rows]:
    """{split: rows} of a source; arguments and errors as of `open_splits`."""
    embedded = {**EMBEDDED, "image_sets": functools.partial(_image_sets, hub)}
    if isinstance(source, str) and source in embedded:
        check_arguments(source, embedded[source], options)
        if streams:
            raise InputError("data.streaming", True, f"is for files and hub names; leave it out for {source}")
        try:
            return embedded[source](**options)
        except TypeError as error:
            raise InputError("data.options", options, f"do not fit {source}: {error}") from None
    for name, reason in _REFUSED.items():
        if name in options:
            raise InputError(f"data.options.{name}", options[name], reason)
    _refuse_urls("data.options", options)
    _refuse_urls("data.source", source)
    local = isinstance(source, list) or is_path(source)
    opened = _open_path(source, options, streams) if local else _open_hub(source, options, hub, streams)
    return opened if isinstance(opened, Mapping) else {str(opened.split or "train"): opened}


def refuse_hub(key: str, source: str, options: Mapping[str, Any]) -> None:
    """Refuse a source that would be loaded from the hub, before anything is opened.

    Raises:
        InputError: naming <key>.source or <key>.options.source.
    """
    for name, text in ((f"{key}.source", source), (f"{key}.options.source", options.get("source"))):
        if isinstance(text, str) and text not in EMBEDDED and not is_path(text):
            raise InputError(name, text, _ASKED)


def is_path(source: str) -> bool:
    """Whether a source looks like a path or exists as one."""
    looks = source.startswith((".", "/", "~")) or _FILE_NAME.fullmatch(source) or glob.has_magic(source)
    return bool(looks) or Path(source).expanduser().exists()


def folder_of(source: Source) -> Path | None:
    """The folder of relative paths in the rows of a source; None if its files lie in several folders."""
    if isinstance(source, str) and Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    folders = {file.parent for file in _files_of(source)}
    return folders.pop() if len(folders) == 1 else None


def _files_of(source: Source) -> list[Path]:
    """The files of a path, a glob or a list of these, in the list's order; those of a glob sorted."""
    if isinstance(source, list):
        return [file for one in source for file in _files_of(one)]
    paths = glob.glob(str(Path(source).expanduser()), recursive=True) if glob.has_magic(source) else [source]  # noqa: PTH207 any root
    return sorted(path for path in (Path(file).expanduser() for file in paths) if path.is_file())


def _refuse_urls(key: str, value: Any) -> None:
    """Refuse URLs: only local files and hub names are opened."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _refuse_urls(f"{key}.{name}", inner)
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and ("://" in text or "::" in text):
            raise InputError(key, text, "is a URL; download it and name the file")


def _open_path(source: Source, options: dict[str, Any], streams: int) -> Any:
    if isinstance(source, str) and Path(source).expanduser().is_dir():
        return _open_folder(source, Path(source).expanduser(), options, streams)
    kinds = " or folder" if isinstance(source, str) else " (a list names files and globs)"
    for one in source if isinstance(source, list) else [source]:
        if not _files_of(one):
            raise InputError("data.source", one, f"cannot be opened: no such file{kinds}; {_KNOWN}")
    files = _files_of(source)
    for file, times in Counter(files).items():
        if times > 1:
            raise InputError("data.source", str(file), "is named twice; a row would be trained on and held out")
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) != 1 or not suffixes <= set(BUILDERS):
        kinds = ", ".join(sorted(suffixes)) or "no files"
        raise InputError("data.source", source, f"holds files of {kinds}; one kind of {_KINDS} is read")
    builder, arguments = BUILDERS[suffixes.pop()]
    check_options(builder, options)
    check_files(source, files, members=not streams)
    return _datasets(
        source, builder, options, streams, data_files=[str(file) for file in files], **{**arguments, **options}
    )


def _open_folder(source: str, path: Path, options: dict[str, Any], streams: int) -> Any:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    images = any(map(is_image, files))
    check_files(source, files, members=not streams or images)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        check_options("saved", options)
        check_saved(path)
        return _call(source, lambda: datasets.load_from_disk(str(path)), options)
    suffixes = {file.suffix.lower() for file in files}
    if images:
        check_options("imagefolder", options)
        return _datasets(source, "imagefolder", options, 0, data_dir=str(path))  # rows are paths, streamed or not
    tables = suffixes & set(BUILDERS)
    if len(tables) != 1:
        kinds = ", ".join(sorted(suffixes - {""})) or "no files"
        raise InputError("data.source", source, f"a folder of images or of one kind of {_KINDS} is read; here {kinds}")
    suffix = tables.pop()
    builder, arguments = BUILDERS[suffix]
    check_options(builder, options)
    return _datasets(source, builder, options, streams, data_dir=str(path), **{**arguments, **options})


def _open_hub(source: str, options: dict[str, Any], hub: bool, streams: int) -> Any:
    if not _HUB_NAME.fullmatch(source):
        raise InputError("data.source", source, f"cannot be opened: neither a path nor a hub name; {_KNOWN}")
    if not hub:
        raise InputError("data.source", source, _ASKED)
    for name in options if streams else ():
        if name not in _HUB_STREAMED:
            remedy = f"is followed without streaming only; of streamed rows {', '.join(_HUB_STREAMED)} are"
            raise InputError(f"data.options.{name}", options[name], remedy)
    builder = _call(source, lambda: datasets.load_dataset_builder(source, **options), options, f"; {_KNOWN}")
    kind = type(builder).__module__.removeprefix("datasets.packaged_modules.").split(".")[0]
    if kind not in _HUB_BUILDERS:
        raise InputError("data.source", source, f"is read by the builder {kind}, which is not among those allowed")
    return _datasets(source, source, options, streams, **options)


def _datasets(source: Source, path: str, options: dict[str, Any], streams: int, **arguments: Any) -> Any:
    load_all = functools.partial(open_streamed, streams) if streams else datasets.load_dataset
    return _call(source, lambda: load_all(path, **arguments), options)


def _call(source: Source, call: Callable[[], Any], options: Mapping[str, Any], known: str = "") -> Any:
    try:
        return call()
    except InputError:
        raise
    except Exception as error:  # the hub client and the builders raise many kinds
        cause = error.__cause__ or error
        if isinstance(cause, _EMPTY) or "corresponds to no data" in str(cause):
            split = "".join(re.findall(r'"(\w+)" corresponds', str(cause))) or "of an empty file"
            raise InputError("data.source", source, f"the split {split} has no rows") from error
        if unknown := _NO_OPTION.search(str(cause)):
            key = f"data.options.{unknown[1]}"
            raise InputError(key, options.get(unknown[1]), f"is no option of {source}; leave it out") from error
        reason = f"{type(cause).__name__}: {cause}".partition("\n")[0]
        arguments = f" with options {dict(options)}" if options else ""
        raise InputError("data.source", source, f"cannot be opened{arguments} ({reason}){known}") from error
