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

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

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
        with pytest.raises(InputError, match=r"image, row 0 = 'photos/p00.png': is relative.*absolute") as caught:
            build(configure(f"data.source={source}", "data.holdout=4"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "no files"),
        (["a.parquet", "nowhere.parquet"], "no such file"),
        (["a.parquet", "digits"], "no such file"),
        (["a.parquet", "someone/something"], "no such file"),
        (["a.parquet", "more"], "a list names files and globs"),
        (["a.parquet", "b.csv"], "holds files of .csv, .parquet; one kind"),
        (["a.parquet", "*.parquet"], "named twice"),
        (["https://x.org/a.parquet"], "is a URL"),
    ],
)
def test_lists_that_are_no_source(names: list[str], said: str, tmp_path: Path) -> None:
    shards(tmp_path, "a.parquet", "more/c.parquet")
    (tmp_path / "b.csv").write_text("n\n1\n")
    local = [name if "/" in name or name == "digits" else str(tmp_path / name) for name in names]
    assert said in refusal(local)


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
    with pytest.raises(InputError, match="mask = .*lacks 1 of 5 stems: lonely"):
        open_splits("folders", holdout=2, options=options)
    Image.new("L", (8, 8)).save(tmp_path / "photos" / "p00.bmp")
    with pytest.raises(InputError, match="p00"):
        open_splits("folders", holdout=2, options=options)
    for bad in ({"image": "nowhere"}, {"image": 3}, {}):
        with pytest.raises(InputError, match=r"^data\.options"):
            open_splits("folders", holdout=2, options=bad)


# ------------------------------------------------------------------------------------------------------------ refusals


def refusal(source: str | list[str], **arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_splits(source, **{"holdout": 2, **arguments})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://x.org/a.parquet", "https://x.org/a.csv", "ftp://x/a.tar", "hf://datasets/a/b", "zip://a::b", "s3://b/a"],
)
def test_urls_are_refused(url: str, tmp_path: Path) -> None:
    assert refusal(url).startswith(f"data.source = '{url}': is a URL")
    assert "is a URL" in refusal(_parquet(tmp_path), options={"data_files": {"train": [url]}})


@pytest.mark.parametrize("name", ["split", "streaming", "trust_remote_code", "num_proc"])
def test_options_that_change_the_kind_of_thing_are_refused_by_name(name: str, tmp_path: Path) -> None:
    assert refusal(_parquet(tmp_path), options={name: "train"}).startswith(f"data.options.{name} = ")


def test_an_unknown_option_is_one_line(tmp_path: Path) -> None:
    assert "surprise" in refusal(_parquet(tmp_path), options={"surprise": 1})


@pytest.mark.parametrize("source", ["nowhere.csv", "./nowhere", "~/nowhere/at/all", "nowhere/*.parquet", "/nowhere"])
def test_a_path_that_is_not_there_is_never_asked_for_on_the_hub(source: str) -> None:
    assert "no such file or folder" in refusal(source)


@pytest.mark.parametrize(("holdout", "rows_"), [(100, 12), (13, 12)])
def test_an_empty_split_is_refused_with_both_numbers(holdout: int, rows_: int, tmp_path: Path) -> None:
    message = refusal(_parquet(tmp_path), holdout=holdout)
    assert f"data.holdout = {holdout}" in message and f"of {rows_}" in message
    (tmp_path / "parts").mkdir()
    for name, lines in (("train", "a\n" * 12), ("validation", "")):
        (tmp_path / "parts" / f"{name}.csv").write_text("text\n" + lines)
    assert "validation" in refusal(str(tmp_path / "parts"), holdout=None)  # `datasets` does not open an empty file


def test_a_column_of_our_own_name_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"__row__": [1] * 8}).to_parquet(tmp_path / "rows.parquet")
    assert "__row__" in refusal(str(tmp_path / "rows.parquet"))


def test_a_missing_column_is_told_with_the_columns_of_the_source(tmp_path: Path, configure: Configure) -> None:
    with pytest.raises(InputError, match=r"no such column, but image, label; set"):
        build(configure(f"data.source={_json_lines(tmp_path)}", "data.holdout=4", "data.columns.label=cls"))


def test_an_image_url_in_a_row_is_named(tmp_path: Path, configure: Configure) -> None:
    lines = rows(tmp_path)
    lines[5]["image"] = "https://x.org/a.png"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="row 5 .*https://x.org/a.png.*is a URL"):
        build(configure(f"data.source={tmp_path / 'rows.jsonl'}", "data.holdout=4"))


class Payload:
    """Makes a marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("ending", ["pkl", "pickle", "pt", "py"])
def test_what_would_run_code_is_never_opened(ending: str, tmp_path: Path) -> None:
    marker, folder = tmp_path / "marker", tmp_path / "data"
    folder.mkdir()
    body = f"open({str(marker)!r}, 'w')".encode() if ending == "py" else pickle.dumps(Payload(marker))
    (folder / f"data.{ending}").write_bytes(body)
    assert "data.source" in refusal(str(folder)) and "data.source" in refusal(str(folder / f"data.{ending}"))
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


def test_names_of_the_hub_may_be_forbidden() -> None:
    assert "hub name" in refusal("someone/something", hub=False)


# ------------------------------------------------------------------------------------ options, pickles, saved folders


@pytest.mark.parametrize(
    "option", ["data_files", "data_dir", "cache_dir", "revision", "token", "storage_options", "surprise", "filesystem"]
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "saved", "metadata"])
def test_a_local_source_has_no_other_options(kind: str, option: str, tmp_path: Path) -> None:
    message = refusal(SOURCES[kind](tmp_path), options={option: "x"})
    assert message.startswith(f"data.options.{option} = 'x': ")


def test_an_option_that_a_builder_lacks_is_named(tmp_path: Path) -> None:
    file = _parquet(tmp_path)  # `datasets` knows the builder itself by a name, as it knows names of the hub
    assert refusal("parquet", options={"data_files": file, "surprise": 1}).startswith("data.options.surprise = 1: ")


def test_a_bad_value_of_an_option_is_told_with_the_options(tmp_path: Path) -> None:
    said = refusal(_delimited(tmp_path, "rows.csv", ","), options={"encoding": "nonsense"})
    assert "with options {'encoding': 'nonsense'}" in said


def test_options_of_a_csv_file_are_read(tmp_path: Path) -> None:
    source = _delimited(tmp_path, "rows.csv", ";")
    assert {"image", "label"} <= set(open_splits(source, holdout=2, options={"sep": ";"})[0].column_names)


@pytest.mark.parametrize("inner", [3, None, ["a"], {"a": 1}])
def test_the_source_of_bags_is_text(inner: Any) -> None:
    assert refusal("image_sets", options={"source": inner, "object": "label"}).startswith("data.options.source = ")


@pytest.mark.parametrize(
    ("source", "options"), [("digits", {}), ("shapes", {}), ("image_sets", {"source": "digits", "object": "label"})]
)
def test_an_unknown_option_of_an_embedded_set_is_named(source: str, options: dict[str, Any]) -> None:
    assert refusal(source, options={**options, "surprise": 1}).startswith("data.options.surprise = 1: ")


def test_bags_of_a_name_of_the_hub_may_be_forbidden() -> None:
    options = {"source": "someone/something", "object": "label"}
    assert "hub name" in refusal("image_sets", options=options, hub=False)


@pytest.mark.parametrize("source", ["nope.pkl", "a/b.CSV", "a/b.npz", "data.Zip", "a/b.jsonl"])
def test_what_looks_like_a_file_is_no_name_of_the_hub(source: str) -> None:
    assert "no such file or folder" in refusal(source, hub=False)


@pytest.mark.parametrize("source", ["user/name-v1.0", "mnist", "user/name.2", "a.b/name"])
def test_names_of_the_hub_may_have_dots(source: str) -> None:
    assert "hub name" in refusal(source, hub=False)


@pytest.mark.parametrize("ending", ["pkl", "pickle", "pyd", "pth", "pt", "PKL", "extra.pickle"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_pickle_in_a_tar_is_named(ending: str, folder: bool, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("000.txt", f"000.{ending}"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert f"holds the pickle 000.{ending}" in refusal(str(tmp_path if folder else tmp_path / "s.tar"))


@pytest.mark.parametrize("name", ["load.py", "rows.pkl", "rows.pickle", "net.pt", "sub/net.PTH"])
@pytest.mark.parametrize("kind", ["parquet", "metadata", "saved"])
def test_scripts_and_pickles_beside_data_are_named(kind: str, name: str, tmp_path: Path) -> None:
    source = SOURCES[kind](tmp_path)
    folder = Path(source) if Path(source).is_dir() else tmp_path
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    assert f"holds {Path(name).name}; scripts and pickles are never run" in refusal(str(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_data_files": [{"filename": "../rows.arrow"}]}, "../rows.arrow"),
        ({"_data_files": [{"filename": "/etc/hostname"}]}, "/etc/hostname"),
        ({"_data_files": [{"filename": "link.arrow"}]}, "link.arrow"),
        ({"_data_files": [{}]}, "None"),
        ({"_data_files": None}, "_data_files"),
        ({"_format_type": "torch"}, "format torch"),
    ],
)
@pytest.mark.parametrize("kind", ["saved", "saved splits"])
def test_a_saved_folder_reads_its_own_files(change: dict[str, Any], said: str, kind: str, tmp_path: Path) -> None:
    source = Path(SOURCES[kind](tmp_path))
    state = next(source.rglob("state.json"))
    (tmp_path / "outside.arrow").touch()
    (state.parent / "link.arrow").symlink_to(tmp_path / "outside.arrow")
    state.write_text(json.dumps({**json.loads(state.read_text()), **change}))
    assert said in refusal(str(source))


def test_splits_of_a_saved_folder_lie_in_it(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["../train"]}))
    assert "../train" in refusal(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", ""), ("a.csv", "text\n"), ("a.json", "[]"), ("a.jsonl", ""), ("a.tsv", "a\tb\n")]
)
def test_an_empty_file_has_no_rows(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert "has no rows" in refusal(str(tmp_path / name))
