"""Amazon Berkeley Objects (Collins et al., 2022, arXiv 2110.06199) from its published files: products with photos.

The folder holds the unpacked archives: `listings/metadata/listings_*.json.gz`, `images/metadata/images.csv.gz` and the
photos in `images/small` (at most 256 pixels) or `images/original`. `mmdiff.data.abo_sample` writes a small one.
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
_DAMAGED = (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error)  # of a file that is no such gzip, or cut


def load(
    folder: str,
    language: str = "en",
    images: str = "small",
    max_images: int = 8,
    every: int = 10,
    min_images: int = 0,
    captions: str | None = None,
) -> datasets.DatasetDict:
    """{"train", "validation"}, one row per product.

    Columns: ``item_id``; ``product_type`` (classes, by name) and ``category``, the same in words; ``item_name``,
    ``brand``, ``color``, ``material`` and ``bullet_points`` (texts, None where the language is missing); ``caption``
    (None without ``captions``); ``image``, the main photo; ``photos``, all photos, the main one first. Photos without a
    file are left out; a product without photos has None. If several marketplaces list a product, each column is from
    the first that has it.

    Args:
        folder: with the unpacked archives.
        language: beginning of the language tags, for example "en" or "de_DE".
        images: folder of the photos, "small" or "original".
        max_images: photos per product; further ones are left out.
        every: k; products whose id has a checksum divisible by k are validation.
        min_images: products with fewer photos are left out.
        captions: CSV file without a header, of product ids and captions; products without a caption are left out.

    Raises:
        InputError: when files are missing or damaged, no listing can be read, or no product is left.
    """
    root = Path(folder).expanduser()
    listings, table = _found(root, "listings", "listings_*.json.gz"), _found(root, "images", "images.csv.gz")
    if not listings or not table:
        raise InputError("folder", folder, "holds no listings_*.json.gz or no images.csv.gz; unpack the archives there")
    if not (root / "images" / images).is_dir():
        raise InputError("images", images, f"no such folder: {root / 'images' / images}")
    for key, value, least in (("max_images", max_images, 1), ("every", every, 2), ("min_images", min_images, 0)):
        if value < least:
            raise InputError(key, value, f"needs at least {least}")
    products = _products(listings, language, _paths(table[0], root / "images" / images))
    _check(products, folder, language, images)
    said = None if captions is None else _captions(Path(captions).expanduser())
    types = sorted({row["product_type"] for row in products.values()} - {None})
    kept = [row for row in products.values() if len(row["photos"] or ()) >= min_images]
    if not kept:
        raise InputError("min_images", min_images, "leaves no product; none has so many photos")
    if said is not None:
        kept = [row | {"caption": said[row["item_id"]]} for row in kept if row["item_id"] in said]
        if not kept:
            raise InputError("captions", captions, "its first column holds no id of a product that is left")
    kept = [row | {"photos": row["photos"] and row["photos"][:max_images]} for row in kept]
    held_out = [zlib.crc32(row["item_id"].encode(errors="surrogatepass")) % every == 0 for row in kept]
    return datasets.DatasetDict(
        {
            split: _dataset([row for row, held in zip(kept, held_out) if held == wanted], types)
            for split, wanted in (("train", False), ("validation", True))
        }
    )


def _products(listings: Iterable[Path], language: str, paths: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """{item_id: row}; of several listings of a product, each column is from the first that has it."""
    products: dict[str, dict[str, Any]] = {}
    for place, entry in _entries(listings):
        row = _row(place, entry, language, paths)
        known = products.setdefault(row["item_id"], row)
        known |= {name: value for name, value in row.items() if known[name] is None}
    return products


def _check(products: dict[str, dict[str, Any]], folder: str, language: str, images: str) -> None:
    """Refuse what can only be a mistake: no product, no text in the language, no photo with a file."""
    rows = products.values()
    if not rows:
        raise InputError("folder", folder, "its listings hold no product")
    if not any(row[name] for row in rows for name in (*_TEXTS, "bullet_points")):
        raise InputError("language", language, "no text is in it; tags look like en_US, and en stands for all of them")
    if not any(row["photos"] for row in rows):
        raise InputError("images", images, "holds none of the photos; unpack the archive of images into the folder")


def _dataset(rows: list[dict[str, Any]], types: list[str]) -> datasets.Dataset:
    features = datasets.Features(
        {
            "item_id": datasets.Value("string"),
            "product_type": datasets.ClassLabel(names=types),
            **dict.fromkeys(("category", *_TEXTS, "bullet_points", "caption"), datasets.Value("string")),
            "image": datasets.Image(),
            "photos": datasets.List(datasets.Image()),
        }
    )
    columns = {name: [row[name] for row in rows] for name in features}
    try:
        return datasets.Dataset.from_dict(columns, features=features)
    except UnicodeEncodeError as error:
        raise InputError("folder", error.object, "is no text of the listings that can be written") from None


# --------------------------------------------------------------------------------------------------------------- files


def _found(root: Path, archive: str, pattern: str) -> list[Path]:
    """Files where the archive unpacks them; else anywhere, which looks through all photos."""
    return sorted((root / archive / "metadata").glob(pattern)) or sorted(root.rglob(pattern))


def _entries(listings: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, product) of all files, one JSON object per line."""
    for path in listings:
        for number, line in enumerate(_lines(path), start=1):
            place = f"{path.name}, line {number}"
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise InputError("folder", place, f"is no JSON: {error}") from None
            if not isinstance(entry, dict) or not isinstance(entry.get("item_id"), str):
                raise InputError("folder", place, "has no item_id")
            yield place, entry


def _lines(path: Path) -> Iterator[str]:
    """The lines of a compressed text.

    Raises:
        InputError: where the file is damaged.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            yield from file
    except _DAMAGED as error:
        raise InputError("folder", path.name, f"cannot be read ({error}); unpack it again") from None


def _paths(table: Path, folder: Path) -> dict[str, Path]:
    """{image_id: file} of the table image_id, height, width, path."""
    rows = csv.DictReader(_lines(table))
    try:
        if not {"image_id", "path"} <= set(rows.fieldnames or ()):
            raise InputError("folder", table.name, "needs the columns image_id and path")
        paths = {row["image_id"]: Path(row["path"] or "") for row in rows}
    except csv.Error as error:
        raise InputError("folder", f"{table.name}, line {rows.line_num}", f"cannot be read ({error})") from None
    for path in paths.values():
        if path.is_absolute() or ".." in path.parts:
            raise InputError("folder", table.name, f"names {path}, which leaves its folder")
    return {image: folder / path for image, path in paths.items()}


def _captions(path: Path) -> dict[str, str]:
    """{item_id: caption}; the first one of a product counts."""
    said: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if row and len(row) != 2:
                    raise InputError("captions", f"{path.name}, line {number}", "needs two columns: item_id, caption")
                if row and row[1].strip():
                    said.setdefault(row[0], row[1].strip())
    except _DAMAGED as error:
        raise InputError("captions", str(path), f"cannot be read ({error})") from None
    return said


# ------------------------------------------------------------------------------------------------------------ products


def _row(place: str, entry: dict[str, Any], language: str, paths: dict[str, Path]) -> dict[str, Any]:
    main, others = entry.get("main_image_id"), entry.get("other_image_id") or []
    if not isinstance(others, list) or not all(isinstance(image, str) for image in (main or "", *others)):
        raise InputError("folder", place, "needs a text as main_image_id and a list of texts as other_image_id")
    ids = dict.fromkeys([main, *others])  # in order, each once
    files = {image: str(paths[image]) for image in ids if image in paths and paths[image].is_file()}
    kind = next(iter(_texts(place, entry, "product_type", language)), None)
    return {
        "item_id": entry["item_id"],
        "product_type": kind,
        "category": kind and kind.replace("_", " ").lower(),
        **{name: next(iter(_texts(place, entry, name, language)), None) for name in _TEXTS},
        "bullet_points": "\n".join(_texts(place, entry, "bullet_point", language)) or None,
        "caption": None,
        "image": files.get(main),
        "photos": list(files.values()) or None,
    }


def _texts(place: str, entry: dict[str, Any], name: str, language: str) -> list[str]:
    """The values of a field in the language; one without a tag is in every language."""
    values = entry.get(name) or []
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise InputError("folder", place, f"{name} needs a list of mappings with value and language_tag")
    own = [v["value"] for v in values if v.get("value") and str(v.get("language_tag", language)).startswith(language)]
    return [str(value) for value in own]
