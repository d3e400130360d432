"""A small folder in the format of Amazon Berkeley Objects, with drawn products: to try the whole way without the data.

It holds what the published files hold: texts in several languages, a product in two marketplaces, missing attributes,
and a photo without a file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmdiff.data.shapes.image_sets import load as load_shapes
from mmdiff.errors import InputError

_MATERIALS = {"circle": "rubber", "square": "wood", "triangle": "paper", "cross": "metal", "ring": "glass"}
_GERMAN = {"red": "rot", "yellow": "gelb", "green": "grün", "cyan": "türkis", "blue": "blau", "magenta": "purpur"}


def write_sample(folder: str | Path, products: int = 60, size: int = 64, most: int = 6, seed: int = 0) -> Path:
    """Listings, the table of images, photos and `captions.csv`, as `mmdiff.data.abo.load` reads them.

    Args:
        folder: a new or an empty one.
        products: 4 at least; each is a coloured shape.
        size: height and width of the photos in pixels.
        most: largest number of photos of a product; 2 is the least.
        seed: of shapes, colours and photos.

    Returns:
        The folder.

    Raises:
        InputError: for a folder with content, or a number that is too small.
    """
    root = Path(folder)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError("folder", str(folder), "exists and is not empty; name a new one")
    for key, value, least in (("products", products, 4), ("size", size, 8), ("most", most, 2)):
        if value < least:
            raise InputError(key, value, f"needs at least {least}")
    rows = load_shapes(products, 1, size, seed=seed, image_sets={"views": (1, most - 1), "visible": 1.0})["train"]
    things = [(f"B0{number:08}", rows[number]) for number in range(products)]
    images = [_write_photos(root / "images" / "small", item, row) for item, row in things]
    listings = [_listing(item, row, [image["image_id"] for image in own]) for (item, row), own in zip(things, images)]
    listings[0]["other_image_id"].append("no-file")
    del listings[1]["color"]
    german, english = _in("de", listings[2]), _in("en", listings[2])  # in two marketplaces
    metadata = root / "listings" / "metadata"
    _compress(metadata / "listings_0.json.gz", _json([*listings[:2], german, *listings[3 : products // 2]]))
    _compress(metadata / "listings_1.json.gz", _json([english, *listings[products // 2 :]]))
    table = [*(image for own in images for image in own), _image("no-file", size)]
    _compress(
        root / "images" / "metadata" / "images.csv.gz", _table([list(table[0]), *(row.values() for row in table)])
    )
    captions = _table((item, f"{row['description']}.") for item, row in things)
    (root / "captions.csv").write_text(captions, encoding="utf-8", newline="")
    return root


def _write_photos(folder: Path, item: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The front view and the others as files; their rows of the table of images."""
    rows = []
    for number, photo in enumerate([row["front"], *row["photos"]]):
        rows.append(_image(f"{item}-{number}", photo.height))
        path = folder / rows[-1]["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path, quality=95)
    return rows


def _image(image: str, size: int) -> dict[str, Any]:
    return {"image_id": image, "height": size, "width": size, "path": f"{image[-4:-2]}/{image}.jpg"}


def _listing(item: str, row: dict[str, Any], images: list[str]) -> dict[str, Any]:
    _, color, shape = row["description"].split()
    return {
        "item_id": item,
        "product_type": [{"value": f"{shape}_TOY".upper()}],
        "item_name": _texts(f"{color} {shape}".capitalize(), f"{_GERMAN[color]}: {shape}"),
        "brand": _texts("Shapes", "Formen"),
        "color": [text | {"standardized_values": [color.capitalize()]} for text in _texts(color, _GERMAN[color])],
        "material": [{"language_tag": "en_US", "value": _MATERIALS[shape]}],
        "bullet_point": [{"language_tag": "en_US", "value": text} for text in (f"A {shape}", f"All of it is {color}")],
        "main_image_id": images[0],
        "other_image_id": images[1:],
        "country": "US",
        "marketplace": "Amazon",
        "domain_name": "amazon.com",
    }


def _texts(english: str, german: str) -> list[dict[str, Any]]:
    return [{"language_tag": "de_DE", "value": german}, {"language_tag": "en_US", "value": english}]


def _in(language: str, listing: dict[str, Any]) -> dict[str, Any]:
    """A listing in one language only."""

    def kept(value: Any) -> bool:
        return not isinstance(value, dict) or value.get("language_tag", language).startswith(language)

    return {
        name: [v for v in value if kept(v)] if isinstance(value, list) else value for name, value in listing.items()
    }


def _json(listings: Iterable[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(listing)}\n" for listing in listings)


def _table(rows: Iterable[Iterable[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue()


def _compress(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
