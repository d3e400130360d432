"""Amazon Berkeley Objects: a sample in the published format, made here, is read as products with their photos."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from mmdiff.build import build
from mmdiff.config import parse_config
from mmdiff.data.abo_sample import write_sample
from mmdiff.data.files import undecoded
from mmdiff.data.sources import open_splits
from mmdiff.errors import InputError
from mmdiff.modalities.pictures import loaded

LISTINGS = [
    {
        "item_id": "B01",
        "brand": [{"language_tag": "de_DE", "value": "Marke"}, {"language_tag": "en_US", "value": "Brand"}],
        "bullet_point": [{"language_tag": "en_US", "value": "Firm"}, {"language_tag": "en_GB", "value": "Soft"}],
        "color": [{"language_tag": "en_US", "standardized_values": ["Red"], "value": "Crimson"}],
        "item_name": [{"language_tag": "en_US", "value": "A chair"}, {"language_tag": "de_DE", "value": "Ein Stuhl"}],
        "main_image_id": "img-1",
        "other_image_id": ["img-2", "img-1", "img-3"],
        "product_type": [{"value": "CHAIR"}],
        "node": [{"node_id": 1, "node_name": "/Home"}],
        "domain_name": "amazon.com",
        "marketplace": "Amazon",
        "country": "US",
    },
    {
        "item_id": "B02",
        "item_name": [{"language_tag": "de_DE", "value": "Ein Tisch"}],
        "main_image_id": "img-2",
        "product_type": [{"value": "TABLE"}],
    },
    {"item_id": "B03", "main_image_id": "img-without-a-file", "other_image_id": ["img-4"]},
    {"item_id": "B04", "product_type": [{"value": "CHAIR"}]},
]
SECOND = [
    {"item_id": "B02", "item_name": [{"language_tag": "en_GB", "value": "A table"}], "main_image_id": "img-4"},
    {"item_id": "B01", "item_name": [{"language_tag": "en_AU", "value": "Another chair"}]},
    *({"item_id": f"C{k:02}", "product_type": [{"value": "LAMP"}], "main_image_id": "img-3"} for k in range(20)),
]


def write_listing(path: Path, entries: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(entry)}\n" for entry in entries)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "abo"
    write_listing(root / "listings" / "metadata" / "listings_0.json.gz", LISTINGS)
    write_listing(root / "listings" / "metadata" / "listings_1.json.gz", SECOND)
    table = root / "images" / "metadata" / "images.csv.gz"
    table.parent.mkdir(parents=True)
    with gzip.open(table, "wt", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image_id", "height", "width", "path"])
        for k in (1, 2, 3, 4):
            rows.writerow([f"img-{k}", 20 + k, 30, f"{k:02}/{k:02}.jpg"])
            (root / "images" / "small" / f"{k:02}").mkdir(parents=True)
            PILImage.new("RGB", (30, 20 + k), (60 * k, 0, 0)).save(
                root / "images" / "small" / f"{k:02}" / f"{k:02}.jpg"
            )
        rows.writerow(["img-without-a-file", 9, 9, "09/09.jpg"])
    return root


def products(folder: Path, **options: Any) -> dict[str, Any]:
    train, validation = open_splits("abo", options={"folder": str(folder), **options})
    assert set(train["item_id"]).isdisjoint(validation["item_id"])
    return {row["item_id"]: row for rows in (train, validation) for row in rows}


def heights(photos: list[Any]) -> list[int]:
    """Which photos they are: 21, 22, …"""
    return [photo.height for photo in photos]


def test_products_have_their_texts_types_and_photos(folder: Path) -> None:
    found = products(folder)
    assert len(found) == 24
    chair = found["B01"]
    assert (chair["item_name"], chair["brand"], chair["color"]) == ("A chair", "Brand", "Crimson")
    assert chair["bullet_points"] == "Firm\nSoft" and chair["material"] is None
    assert heights(chair["photos"]) == [21, 22, 23] and chair["image"].height == 21
    train, _ = open_splits("abo", options={"folder": str(folder)})
    types = train.features["product_type"]
    assert types.names == ["CHAIR", "LAMP", "TABLE"] and types.int2str(chair["product_type"]) == "CHAIR"


def test_each_column_is_from_the_first_listing_that_has_it(folder: Path) -> None:
    table = products(folder)["B02"]
    assert table["item_name"] == "A table" and heights(table["photos"]) == [22]
    assert products(folder)["B01"]["item_name"] == "A chair"
    german = products(folder, language="de")
    assert german["B02"]["item_name"] == "Ein Tisch" and german["B01"]["brand"] == "Marke"


def test_what_is_missing_is_none(folder: Path) -> None:
    found = products(folder)
    assert found["B03"]["image"] is None and heights(found["B03"]["photos"]) == [24]
    assert found["B03"]["product_type"] is None and found["B03"]["item_name"] is None
    assert found["B04"]["photos"] is None and found["B04"]["image"] is None
    assert heights(products(folder, max_images=2)["B01"]["photos"]) == [21, 22]


def test_the_split_does_not_depend_on_the_rest(folder: Path) -> None:
    def held_out() -> set[str]:
        return set(open_splits("abo", options={"folder": str(folder), "every": 4})[1]["item_id"])

    before = held_out()
    assert 1 <= len(before) < 12
    (folder / "listings" / "metadata" / "listings_0.json.gz").unlink()
    assert held_out() == {item for item in before if item not in ("B03", "B04")}


def test_a_model_reads_them(folder: Path, tiny: dict[str, Any]) -> None:
    tiny["data"] = {
        "source": "abo",
        "options": {"folder": str(folder), "every": 3},
        "columns": {"image_set": "photos", "label": "product_type"},
        "cache_mib": 0,
    }
    size = {"size": 16, "resize": True}
    tiny["modalities"] = {
        "image": {"kind": "image", **size},
        "label": {"kind": "label"},
        "image_set": {"kind": "image_set", "dim": 8, "max_images": 8, **size},
    }
    built = build(parse_config(tiny))
    rows = built.train.rows
    batch = built.train.all()
    assert batch.values["image_set"].shape == (len(rows), 8, 4, 16, 16)
    assert batch.present["image_set"].tolist() == [row["photos"] is not None for row in rows]
    assert built.config.modalities["label"].settings()["names"] == ["CHAIR", "LAMP", "TABLE"]


def test_products_have_a_least_and_a_largest_number_of_photos(folder: Path) -> None:
    whole = products(folder)
    assert set(products(folder, min_images=1)) == set(whole) - {"B04"}
    few = [
        {"item_id": item, "main_image_id": "img-1", "other_image_id": ["img-2"]} for item in ("D1", "D2", "D3", "D4")
    ]
    write_listing(folder / "listings" / "metadata" / "listings_2.json.gz", few)
    found = products(folder, min_images=2, every=2)
    assert set(found) == {"B01", "D1", "D2", "D3", "D4"}
    assert heights(products(folder, min_images=2, max_images=1, every=2)["B01"]["photos"]) == [21]


def test_products_with_a_caption_are_kept_where_captions_are_named(folder: Path) -> None:
    captions = folder / "captions.csv"
    captions.write_text('B01,"a chair, red"\nB01,another\nB03,\nB99,of no product\nC01, a lamp \nC02,x\nC03,x\n')
    found = products(folder, captions=str(captions), every=2)
    assert {item: row["caption"] for item, row in found.items()} == {
        "B01": "a chair, red",
        "C01": "a lamp",
        **dict.fromkeys(("C02", "C03"), "x"),
    }
    assert {row["caption"] for row in products(folder).values()} == {None}


def test_the_sample_is_in_the_published_format(tmp_path: Path) -> None:
    root = write_sample(tmp_path / "sample", products=30, size=16, most=4)
    found = products(root, captions=str(root / "captions.csv"), every=3, min_images=2)
    assert len(found) == 30 and {len(row["photos"]) for row in found.values()} == {2, 3, 4}
    missing = [item for item, row in found.items() if row["color"] is None]
    assert missing == ["B000000001"] and len(products(root, language="de")) == 30
    for item, row in found.items():
        _, color, shape = row["caption"].removesuffix(".").split()
        assert (row["category"], row["item_name"]) == (f"{shape} toy", f"{color} {shape}".capitalize())
        assert item in missing or row["color"] == color
        assert max(row["image"].resize((1, 1)).getpixel((0, 0))) > 30  # not black
    with pytest.raises(InputError, match="^folder = .*not empty"):
        write_sample(root)
    again = write_sample(tmp_path / "again", products=30, size=16, most=4)
    files = [path for path in root.rglob("*") if path.is_file()]
    assert all((again / path.relative_to(root)).read_bytes() == path.read_bytes() for path in files)


def refused(key: str, value: str, root: Path, **options: Any) -> None:
    with pytest.raises(InputError, match=f"^{key} = {re.escape(value)}"):
        open_splits("abo", options={"folder": str(root), **options})


def test_other_folders_and_numbers_are_refused(folder: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.csv"
    captions.write_text("B99,of no product\n")
    for key, value, options in (
        ("images", "'original'", {"images": "original"}),
        ("max_images", "0", {"max_images": 0}),
        ("min_images", "9", {"min_images": 9}),
        ("min_images", "-1", {"min_images": -1}),
        ("every", "1", {"every": 1}),
        ("language", "'english'", {"language": "english"}),
        ("folder", "", {"folder": str(tmp_path / "elsewhere")}),
        ("captions", "", {"captions": str(captions)}),
        ("captions", "", {"captions": str(tmp_path / "none.csv")}),
        ("data.options.languages", "'en'", {"languages": "en"}),
        ("data.options", "", {"every": "two"}),
    ):
        refused(key, value, folder, **options)
    captions.write_text("B01\n")
    refused("captions", "'captions.csv, line 1'", folder, captions=str(captions))


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"no gzip", ""),
        (gzip.compress(b"x" * 10_000, mtime=0)[:-20], ""),
        (gzip.compress(b"\xff\xfe", mtime=0), ""),
        (gzip.compress(b"{", mtime=0), ", line 1"),
        (gzip.compress(b'{"item": 3}', mtime=0), ", line 1"),
        (gzip.compress(b'{"item_id": "A", "color": "red"}', mtime=0), ", line 1"),
        (gzip.compress(b'{"item_id": "A", "other_image_id": 3}', mtime=0), ", line 1"),
        (gzip.compress(b'{"item_id": "A", "other_image_id": [{}]}', mtime=0), ", line 1"),
    ],
    ids=["no-gzip", "cut", "no-text", "cut-json", "no-id", "no-list", "no-texts", "no-names"],
)
def test_damaged_listings_are_named(content: bytes, place: str, folder: Path) -> None:
    (folder / "listings" / "metadata" / "listings_2.json.gz").write_bytes(content)
    refused("folder", f"'listings_2.json.gz{place}'", folder)


def test_damaged_tables_and_photos_are_named(folder: Path) -> None:
    table = folder / "images" / "metadata" / "images.csv.gz"
    content = table.read_bytes()
    for text in (b"image_id,file\n", b"image_id,path\nimg-1,../../secret.jpg\n", b"image_id,path\nimg-1,/etc/x.jpg\n"):
        table.write_bytes(gzip.compress(text))
        refused("folder", "'images.csv.gz'", folder)
    table.write_bytes(gzip.compress(b"image_id,path\nimg-1,77/77.jpg\n"))
    refused("images", "'small'", folder)
    table.write_bytes(content)
    (folder / "images" / "small" / "01" / "01.jpg").write_bytes(b"no picture")
    rows = undecoded(open_splits("abo", options={"folder": str(folder)})[0])  # read where it is needed
    with pytest.raises(InputError, match=r"01\.jpg"):
        loaded("photos", rows[0]["photos"][0])
