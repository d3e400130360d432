"""Amazon Berkeley Objects (Collins et al., 2022) from its published files: products with their photos.

The folder holds the unpacked archives: `listings/metadata/listings_*.json.gz`, `images/metadata/images.csv.gz` and the
photos in `images/small` (at most 256 pixels) or `images/original`.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets

from mmdiff.errors import InputError

_TEXTS = ("item_name", "brand", "color", "material")  # columns of text: the first value in the language


def load(
    folder: str, language: str = "en", images: str = "small", max_images: int = 8, every: int = 10
) -> datasets.DatasetDict:
    """{"train", "validation"}, one row per product.

    Columns: ``item_id``; ``product_type`` (classes, by name); ``item_name``, ``brand``, ``color``, ``material`` and
    ``bullet_points`` (texts, None where the language is missing); ``image``, the main photo; ``photos``, all photos,
    the main one first. Photos without a file are left out; a product without photos has None. If several marketplaces
    list a product, each column is from the first that has it.

    Args:
        folder: with the unpacked archives.
        language: beginning of the language tags, for example "en" or "de_DE".
        images: folder of the photos, "small" or "original".
        max_images: photos per product.
        every: k; products whose id has a checksum divisible by k are validation.

    Raises:
        InputError: when files are missing or no listing can be read.
    """
    root = Path(folder).expanduser()
    listings, table = sorted(root.rglob("listings_*.json.gz")), next(iter(sorted(root.rglob("images.csv.gz"))), None)
    if not listings or table is None:
        raise InputError("folder", folder, "holds no listings_*.json.gz or no images.csv.gz; unpack the archives there")
    if not (root / "images" / images).is_dir():
        raise InputError("images", images, f"no such folder: {root / 'images' / images}")
    if max_images < 1 or every < 2:
        raise InputError("max_images" if max_images < 1 else "every", min(max_images, every), "is too small")
    paths = _paths(table, root / "images" / images)
    products: dict[str, dict[str, Any]] = {}
    for entry in _entries(listings):
        row = _row(entry, language, paths, max_images)
        known = products.setdefault(row["item_id"], row)
        known |= {name: value for name, value in row.items() if known[name] is None}
    if not products:
        raise InputError("folder", folder, "its listings hold no product")
    types = sorted({row["product_type"] for row in products.values()} - {None})
    held_out = {item: zlib.crc32(item.encode()) % every == 0 for item in products}
    return datasets.DatasetDict(
        {
            split: _dataset([row for item, row in products.items() if held_out[item] == held], types)
            for split, held in (("train", False), ("validation", True))
        }
    )


def _dataset(rows: list[dict[str, Any]], types: list[str]) -> datasets.Dataset:
    features = datasets.Features(
        {
            "item_id": datasets.Value("string"),
            "product_type": datasets.ClassLabel(names=types),
            **dict.fromkeys((*_TEXTS, "bullet_points"), datasets.Value("string")),
            "image": datasets.Image(),
            "photos": datasets.List(datasets.Image()),
        }
    )
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _entries(listings: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The products of all files, one JSON object per line."""
    for path in listings:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    entry = json.loads(line)
                except ValueError as error:
                    raise InputError("folder", f"{path.name}, line {number}", f"is no JSON: {error}") from None
                if not isinstance(entry, dict) or "item_id" not in entry:
                    raise InputError("folder", f"{path.name}, line {number}", "has no item_id")
                yield entry


def _paths(table: Path, folder: Path) -> dict[str, Path]:
    """{image_id: file} of the table image_id, height, width, path."""
    with gzip.open(table, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if not {"image_id", "path"} <= set(rows.fieldnames or ()):
            raise InputError("folder", table.name, "needs the columns image_id and path")
        return {row["image_id"]: folder / row["path"] for row in rows}


def _row(entry: dict[str, Any], language: str, paths: dict[str, Path], max_images: int) -> dict[str, Any]:
    ids = dict.fromkeys([entry.get("main_image_id"), *(entry.get("other_image_id") or ())])  # in order, each once
    files = [str(paths[image]) for image in ids if image in paths and paths[image].is_file()][:max_images]
    types = entry.get("product_type") or [{}]
    main = paths.get(entry.get("main_image_id") or "")
    return {
        "item_id": entry["item_id"],
        "product_type": types[0].get("value"),
        **{name: next(iter(_texts(entry, name, language)), None) for name in _TEXTS},
        "bullet_points": "\n".join(_texts(entry, "bullet_point", language)) or None,
        "image": str(main) if main is not None and main.is_file() else None,
        "photos": files or None,
    }


def _texts(entry: dict[str, Any], name: str, language: str) -> list[str]:
    """The values of a field in the language."""
    values = entry.get(name) or ()
    return [v["value"] for v in values if v.get("value") and v.get("language_tag", language).startswith(language)]
