"""Every kind of source gives the same rows; what is no source is refused in one line that says why."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from refusals import refused

from mmdiff.build import build
from mmdiff.config import Config
from mmdiff.data import open_splits
from mmdiff.data.files import undecoded
from mmdiff.errors import InputError

Configure = Callable[..., Config]
COUNT = 12
NAMES = ("cat", "dog", "owl")


def photos(folder: Path, count: int = COUNT, ending: str = "png") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    paths = [folder / f"p{index:02d}.{ending}" for index in range(count)]
    for path, image in zip(paths, pixels):
        Image.fromarray(image).save(path)
    return paths


def rows(root: Path) -> list[dict[str, Any]]:
    """Paths relative to ``root``, and labels."""
    return [
        {"image": str(path.relative_to(root)), "label": index % 3} for index, path in enumerate(photos(root / "photos"))
    ]


def _delimited(root: Path, name: str, delimiter: str) -> str:
    with (root / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "label"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows(root))
    return str(root / name)


def _json_lines(root: Path) -> str:
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(root)))
    return str(root / "rows.jsonl")


def _json(root: Path) -> str:
    (root / "rows.json").write_text(json.dumps(rows(root)))
    return str(root / "rows.json")


def _table(root: Path) -> datasets.Dataset:
    columns = {"image": [Image.open(root / r["image"]) for r in rows(root)], "label": [i % 3 for i in range(COUNT)]}
    types = {"image": datasets.Image(), "label": datasets.Value("int64")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(types))


def _parquet(root: Path) -> str:
    _table(root).to_parquet(root / "rows.parquet")
    return str(root / "rows.parquet")


def _bytes(root: Path) -> str:
    columns = {"image": [(root / r["image"]).read_bytes() for r in rows(root)], "label": [i % 3 for i in range(COUNT)]}
    datasets.Dataset.from_dict(columns).to_parquet(root / "rows.parquet")
    return str(root / "rows.parquet")


def _views(root: Path) -> str:
    """Types that other tools write: views of texts, decimals."""
    labels = pa.array([Decimal(index % 3) for index in range(COUNT)], pa.decimal128(3, 0))
    images = pa.array([row["image"] for row in rows(root)], pa.string_view())
    pq.write_table(pa.table({"image": images, "label": labels}), root / "rows.parquet")
    return str(root / "rows.parquet")


def _structs(root: Path) -> str:
    """Structs of a path or bytes with further fields."""
    files = [{"path": row["image"], "bytes": None, "width": 8, "label": row["label"]} for row in rows(root)]
    files[1] |= {"path": None, "bytes": (root / files[1]["path"]).read_bytes()}
    pq.write_table(pa.table({"image": files, "label": [file["label"] for file in files]}), root / "rows.parquet")
    return str(root / "rows.parquet")


def _arrays(root: Path) -> str:
    pixels = [np.asarray(Image.open(root / r["image"])) for r in rows(root)]
    types = {"image": datasets.Array2D((8, 8), "uint8"), "label": datasets.Value("int64")}
    columns = {"image": pixels, "label": [i % 3 for i in range(COUNT)]}
    datasets.Dataset.from_dict(columns, features=datasets.Features(types)).save_to_disk(root / "arrays")
    return str(root / "arrays")


def _glob(root: Path) -> str:
    table = _table(root)
    for part in range(2):
        table.select(range(part * 6, part * 6 + 6)).to_parquet(root / f"part-{part}.parquet")
    return str(root / "part-*.parquet")


def _saved(root: Path) -> str:
    _table(root).save_to_disk(root / "saved")
    return str(root / "saved")


def _saved_splits(root: Path) -> str:
    datasets.DatasetDict({"train": _table(root)}).save_to_disk(root / "saved")
    return str(root / "saved")


def _arrow(root: Path) -> str:
    return str(next(Path(_saved(root)).glob("*.arrow")))


def _metadata(root: Path) -> str:
    lines = [json.dumps({"file_name": Path(r["image"]).name, "label": r["label"]}) for r in rows(root)]
    (root / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    return str(root / "photos")


SOURCES: dict[str, Callable[[Path], str]] = {
    "csv": lambda root: _delimited(root, "rows.csv", ","),
    "tsv": lambda root: _delimited(root, "rows.tsv", "\t"),
    "json": _json,
    "jsonl": _json_lines,
    "parquet": _parquet,
    "bytes": _bytes,
    "views": _views,
    "structs": _structs,
    "arrays": _arrays,
    "glob": _glob,
    "arrow": _arrow,
    "saved": _saved,
    "saved splits": _saved_splits,
    "metadata": _metadata,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_the_same_values(kind: str, tmp_path: Path, configure: Configure) -> None:
    source = SOURCES[kind](tmp_path)
    values = build(configure(f"data.source={source}", "data.holdout=12")).train.all().values
    images = np.stack([np.asarray(Image.open(path)) for path in photos(tmp_path / "photos")[:11]])
    assert np.array_equal(((values["image"][:, 0] + 1) * 127.5).round().numpy(), images)
    assert values["label"].tolist() == [index % 3 for index in range(11)]


def test_class_folders_are_labels(tmp_path: Path, configure: Configure) -> None:
    for name in NAMES:
        photos(tmp_path / "data" / name, 4)
    built = build(configure(f"data.source={tmp_path / 'data'}", "data.holdout=4"))
    assert built.config.modalities["label"].settings()["names"] == list(NAMES)
    assert built.train.all().values["label"].bincount().tolist() == [3, 3, 3]


def test_webdataset_shards(tmp_path: Path, configure: Configure) -> None:
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for index, path in enumerate(photos(tmp_path / "photos")):
            tar.add(path, f"{index:03d}.png")
            label = tarfile.TarInfo(f"{index:03d}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(str(index % 3).encode()))
    columns = ["data.columns.image=png", "data.columns.label=cls", "data.holdout=4"]
    values = build(configure(f"data.source={tmp_path / 'shard-*.tar'}", *columns)).train.all().values
    assert sorted(values["label"].tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    source = _json_lines(tmp_path)
    assert len(open_splits(source, holdout=4)[0]) == 9
    with Path(source).open("a") as file:
        file.write(json.dumps({"image": "photos/p00.png", "label": 1}) + "\n")
    assert len(open_splits(source, holdout=4)[0]) == 10


# ------------------------------------------------------------------------------------------------------ lists of files


def shards(root: Path, *names: str) -> list[str]:
    """Parquet files of the numbers 0, 1, 2 …, four in each."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"n": list(range(4 * number, 4 * number + 4))}).to_parquet(root / name)
    return [str(root / name) for name in names]


def test_a_list_of_files_is_read_in_its_order(tmp_path: Path) -> None:
    first, second, third = shards(tmp_path, "b.parquet", "a.parquet", "more/c.parquet")
    train, held_out = open_splits([third, first, second], holdout=4)
    assert train["n"] == [8, 9, 10, 0, 1, 2, 4, 5, 6] and held_out["n"] == [11, 3, 7]
    assert open_splits([third, str(tmp_path / "?.parquet")], holdout=4)[0]["n"] == [8, 9, 10, 4, 5, 6, 0, 1, 2]


def test_a_config_names_a_list_of_files(configure: Configure, tmp_path: Path) -> None:
    whole = _delimited(tmp_path, "rows.csv", ",")
    header, *lines = Path(whole).read_text().splitlines()
    for name, part in (("a", lines[:6]), ("b", lines[6:])):
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *part]) + "\n")
    both = f"[{tmp_path / 'a.csv'},{tmp_path / 'b.csv'}]"
    one, other = (build(configure(f"data.source={source}", "data.holdout=4")) for source in (whole, both))
    assert torch.equal(one.train.all().values["image"], other.train.all().values["image"])
    assert "a.csv, " in other.train.source and "b.csv (train)" in other.train.source


def test_relative_paths_of_several_folders_are_refused(configure: Configure, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        _json_lines(tmp_path / name)
    for source in (f"[{tmp_path}/a/rows.jsonl,{tmp_path}/b/rows.jsonl]", f"{tmp_path}/*/rows.jsonl"):
        with refused("data.columns.image=image, row 0", "photos/p00.png"):
            build(configure(f"data.source={source}", "data.holdout=4"))


def opened(source: str | list[str], **arguments: Any) -> Any:
    return open_splits(source, **{"holdout": 2, **arguments})


def test_lists_that_are_no_source(tmp_path: Path) -> None:
    shards(tmp_path, "a.parquet", "more/c.parquet")
    (tmp_path / "b.csv").write_text("n\n1\n")
    with refused("data.source", []):
        opened([])
    url = "https://x.org/a.parquet"
    with refused("data.source", url, "URL"):
        opened([url])
    one = str(tmp_path / "a.parquet")
    for other, *facts in (
        (str(tmp_path / "nowhere.parquet"), "no such file"),
        ("digits", "no such file"),
        ("someone/something", "no such file"),
        (str(tmp_path / "more"), "files and globs"),
    ):
        with refused("data.source", other, *facts):
            opened([one, other])
    for other, *facts in ((str(tmp_path / "b.csv"), ".csv, .parquet"), (str(tmp_path / "*.parquet"), "twice")):
        with refused("data.source", ANY, *facts):
            opened([one, other])


# ------------------------------------------------------------------------------------------------------ paired folders


def pair(root: Path, *parts: str) -> dict[str, str]:
    for part in parts or ("",):
        photos(root / "photos" / part, 4, "jpg")
        photos(root / "masks" / part, 4)
    return {"image": str(root / "photos"), "mask": str(root / "masks")}


def test_folders_pair_by_stem(tmp_path: Path) -> None:
    train, held_out = open_splits("folders", holdout=2, options=pair(tmp_path))
    assert len(train) == len(held_out) == 2 and {"image", "mask"} <= set(train.column_names)
    for row in undecoded(train):
        assert Path(row["image"]["path"]).stem == Path(row["mask"]["path"]).stem


def test_hidden_files_are_no_rows_and_arrays_are(tmp_path: Path) -> None:
    options = pair(tmp_path)
    (tmp_path / "photos" / "._p00.jpg").write_bytes(b"as macOS writes them")
    for index in range(4):
        np.save(tmp_path / "masks" / f"p{index:02d}.npy", np.zeros((8, 8)))
        (tmp_path / "masks" / f"p{index:02d}.png").unlink()
    train, _ = open_splits("folders", holdout=2, options=options)
    assert [Path(row["mask"]["path"]).name for row in undecoded(train)] == ["p00.npy", "p02.npy"]


def test_sub_folders_are_splits(tmp_path: Path) -> None:
    assert [len(part) for part in open_splits("folders", options=pair(tmp_path, "train", "validation"))] == [4, 4]


def test_files_that_do_not_pair_are_named(tmp_path: Path) -> None:
    options = pair(tmp_path)
    Image.new("L", (8, 8)).save(tmp_path / "photos" / "lonely.png")
    with refused("data.options.mask", options["mask"], "1 of 5", "lonely"):
        open_splits("folders", holdout=2, options=options)
    Image.new("L", (8, 8)).save(tmp_path / "photos" / "p00.bmp")
    with refused("data.options.image", ANY, "p00.jpg", "p00.bmp"):
        open_splits("folders", holdout=2, options=options)
    for key, value, bad in ((".image", "nowhere", {"image": "nowhere"}), (".image", 3, {"image": 3}), ("", {}, {})):
        with refused(f"data.options{key}", value):
            open_splits("folders", holdout=2, options=bad)


# ------------------------------------------------------------------------------------------------------------ refusals


URLS = ["http://x.org/a.parquet", "https://x.org/a.csv", "ftp://x/a.tar", "hf://datasets/a/b", "zip://a::b", "s3://b/a"]


def test_urls_are_refused(tmp_path: Path) -> None:
    file = _parquet(tmp_path)
    for url in URLS:
        with refused("data.source", url, "URL"):
            opened(url)
        with refused("data.options.data_files.train", url, "URL"):
            opened(file, options={"data_files": {"train": [url]}})


def test_a_path_that_is_not_there_is_never_asked_for_on_the_hub() -> None:
    for source in ("nowhere.csv", "./nowhere", "~/nowhere/at/all", "nowhere/*.parquet", "/nowhere"):
        with refused("data.source", source, "no such file or folder"):
            opened(source)
    for source in ("nope.pkl", "a/b.CSV", "a/b.npz", "data.Zip", "a/b.jsonl"):
        with refused("data.source", source, "no such file or folder"):
            opened(source, hub=False)


def test_names_of_the_hub_may_be_forbidden_and_may_have_dots() -> None:
    for source in ("someone/something", "user/name-v1.0", "mnist", "user/name.2", "a.b/name"):
        with refused("data.source", source, "hub"):
            opened(source, hub=False)
        with refused("data.source", source, "hub"):
            opened("image_sets", options={"source": source, "object": "label"}, hub=False)


def test_an_empty_split_is_refused_with_both_numbers(tmp_path: Path) -> None:
    file = _parquet(tmp_path)
    for holdout in (100, 13):
        with refused("data.holdout", holdout, "12"):
            opened(file, holdout=holdout)
    (tmp_path / "parts").mkdir()
    for name, lines in (("train", "a\n" * 12), ("validation", "")):
        (tmp_path / "parts" / f"{name}.csv").write_text("text\n" + lines)
    with refused("data.source", ANY, "validation"):  # `datasets` does not open an empty file
        opened(str(tmp_path / "parts"), holdout=None)


def test_a_column_of_our_own_name_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"__row__": [1] * 8}).to_parquet(tmp_path / "rows.parquet")
    with refused("data.source", ANY, "__row__"):
        opened(str(tmp_path / "rows.parquet"))


def test_a_missing_column_is_told_with_the_columns_of_the_source(tmp_path: Path, configure: Configure) -> None:
    with refused("data.columns.label", "cls", "image, label"):
        build(configure(f"data.source={_json_lines(tmp_path)}", "data.holdout=4", "data.columns.label=cls"))


def test_an_image_url_in_a_row_is_named(tmp_path: Path, configure: Configure) -> None:
    lines = rows(tmp_path)
    lines[5]["image"] = "https://x.org/a.png"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with refused("data.columns.image=image, row 5", "https://x.org/a.png", "URL"):
        build(configure(f"data.source={tmp_path / 'rows.jsonl'}", "data.holdout=4"))


class Payload:
    """Makes a marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_what_would_run_code_is_never_opened(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for ending in ("pkl", "pickle", "pt", "py"):
        body = f"open({str(marker)!r}, 'w')".encode() if ending == "py" else pickle.dumps(Payload(marker))
        file = tmp_path / ending / f"data.{ending}"
        file.parent.mkdir()
        file.write_bytes(body)
        for source in (file.parent, file):
            with refused("data.source", str(source)):
                opened(str(source))
    assert not marker.exists()


def test_a_member_of_a_shard_is_never_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for index, ending in enumerate(["pyd", "pickle", "pth", "npy"] * 2):
            body = pickle.dumps(Payload(marker))
            member = tarfile.TarInfo(f"{index:03d}.{ending}")
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    with contextlib.suppress(InputError):
        open_splits(str(tmp_path / "s.tar"), holdout=2)
    assert not marker.exists()


# ------------------------------------------------------------------------------------ options, pickles, saved folders


OPTIONS = ["data_files", "data_dir", "cache_dir", "revision", "token", "storage_options", "surprise", "filesystem"]
OPTIONS += ["split", "streaming", "trust_remote_code", "num_proc"]  # they change the kind of thing


def test_a_local_source_has_no_other_options(tmp_path: Path) -> None:
    for kind in ("csv", "jsonl", "parquet", "saved", "metadata"):
        (tmp_path / kind).mkdir()
        source = SOURCES[kind](tmp_path / kind)
        for option in OPTIONS:
            with refused(f"data.options.{option}"):
                opened(source, options={option: "x"})


def test_an_option_that_a_builder_or_an_embedded_set_lacks_is_named(tmp_path: Path) -> None:
    file = _parquet(tmp_path)  # `datasets` knows the builder itself by a name, as it knows names of the hub
    others: list[tuple[str, dict[str, Any]]] = [("digits", {}), ("shapes", {}), ("parquet", {"data_files": file})]
    for source, options in [*others, ("image_sets", {"source": "digits", "object": "label"})]:
        with refused("data.options.surprise", 1):
            opened(source, options={**options, "surprise": 1})


def test_a_bad_value_of_an_option_is_told_with_the_options(tmp_path: Path) -> None:
    with refused("data.source", ANY, "{'encoding': 'nonsense'}"):
        opened(_delimited(tmp_path, "rows.csv", ","), options={"encoding": "nonsense"})


def test_options_of_a_csv_file_are_read(tmp_path: Path) -> None:
    source = _delimited(tmp_path, "rows.csv", ";")
    assert {"image", "label"} <= set(open_splits(source, holdout=2, options={"sep": ";"})[0].column_names)


def test_the_source_of_image_sets_is_text() -> None:
    for inner in (3, None, ["a"], {"a": 1}):
        with refused("data.options.source", inner):
            opened("image_sets", options={"source": inner, "object": "label"})


def test_a_pickle_in_a_tar_is_named(tmp_path: Path) -> None:
    for ending in ("pkl", "pickle", "pyd", "pth", "pt", "PKL", "extra.pickle"):
        with tarfile.open(tmp_path / "s.tar", "w") as tar:
            for name in ("000.txt", f"000.{ending}"):
                tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        for source in (tmp_path, tmp_path / "s.tar"):
            with refused("data.source", ANY, f"000.{ending}"):
                opened(str(source))


def test_scripts_and_pickles_beside_data_are_named(tmp_path: Path) -> None:
    for kind in ("parquet", "metadata", "saved"):
        (tmp_path / kind).mkdir()
        source = Path(SOURCES[kind](tmp_path / kind))
        folder = source if source.is_dir() else source.parent
        for name in ("load.py", "rows.pkl", "rows.pickle", "net.pt", "sub/net.PTH"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
            with refused("data.source", str(folder), Path(name).name):
                opened(str(folder))
            (folder / name).unlink()


CHANGED_STATES = [
    ({"_data_files": [{"filename": "../rows.arrow"}]}, "../rows.arrow"),
    ({"_data_files": [{"filename": "/etc/hostname"}]}, "/etc/hostname"),
    ({"_data_files": [{"filename": "link.arrow"}]}, "link.arrow"),
    ({"_data_files": [{}]}, "None"),
    ({"_data_files": None}, "_data_files"),
    ({"_format_type": "torch"}, "format torch"),
]


def test_a_saved_folder_reads_its_own_files(tmp_path: Path) -> None:
    (tmp_path / "outside.arrow").touch()
    for kind in ("saved", "saved splits"):
        (tmp_path / kind).mkdir()
        source = Path(SOURCES[kind](tmp_path / kind))
        state = next(source.rglob("state.json"))
        (state.parent / "link.arrow").symlink_to(tmp_path / "outside.arrow")
        own = json.loads(state.read_text())
        for change, fact in CHANGED_STATES:
            state.write_text(json.dumps({**own, **change}))
            with refused("data.source", ANY, fact):
                opened(str(source))


def test_splits_of_a_saved_folder_lie_in_it(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["../train"]}))
    with refused("data.source", ANY, "../train"):
        opened(str(tmp_path))


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name, text in [("a.csv", ""), ("a.csv", "text\n"), ("a.json", "[]"), ("a.jsonl", ""), ("a.tsv", "a\tb\n")]:
        (tmp_path / name).write_text(text)
        with refused("data.source", str(tmp_path / name), "no rows"):
            opened(str(tmp_path / name))
