"""A folder of a thousand files as people have them: every mode and format, sizes mixed, ten of them broken."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdiff.config import Config
from mmdiff.training import train

FILES, EVERY = 1000, 10
FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("1", "L", "P"),
}
BROKEN = [
    *[("JPEG", "RGB", 0.5), ("PNG", "RGB", 0.5), ("TIFF", "RGB", 0.5), ("JPEG", "RGB", 0.0), ("PNG", "RGB", 0.0)],
    *[("JPEG", "CMYK", 0.3), ("PNG", "RGBA", 0.3), ("TIFF", "L", 0.3)],
]


def encoded(kind: str, mode: str, random: np.random.Generator) -> bytes:
    height, width = random.integers(12, 40, 2)
    if mode == "I;16":
        image = Image.fromarray(random.integers(0, 65536, (height, width), np.uint16))
    else:
        rgba = Image.fromarray(random.integers(0, 256, (height, width, 4), np.uint8))
        image = rgba.convert(mode) if mode in ("LA", "RGBA") else rgba.convert("RGB").convert(mode)
    exif = Image.Exif()
    exif[0x0112] = int(random.integers(1, 9))
    file = io.BytesIO()
    image.save(file, kind, **({"exif": exif} if kind not in ("BMP", "GIF") and random.random() < 0.3 else {}))
    return file.getvalue()


def contents(random: np.random.Generator) -> list[tuple[str, bytes]]:
    """(ending, bytes) of every file; the broken ones are training rows."""
    kinds = cycle([(kind, mode) for kind, modes in FORMATS.items() for mode in modes])
    files = [(kind.lower(), encoded(kind, mode, random)) for _, (kind, mode) in zip(range(FILES), kinds)]
    for number, (kind, mode, part) in enumerate(BROKEN):
        data = encoded(kind, mode, random)
        files[number * 100 + 5] = kind.lower(), data[: int(len(data) * part)]
    files[805], files[905] = ("webp", b""), ("jpeg", b"This is a text.")
    return files


@pytest.mark.slow
def test_a_mixed_folder_trains_and_its_broken_files_are_counted(
    configure: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, (ending, data) in enumerate(contents(np.random.default_rng(0))):
        path = tmp_path / "photos" / ("cats" if number < FILES // 2 else "dogs") / f"{number:04d}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    config = configure(
        *[f"data.source={tmp_path / 'photos'}", f"data.holdout={EVERY}", "data.on_error=skip", "data.max_errors=0.02"],
        "modalities.image={kind: image, size: 16, channels: 3, resize: true}",
        *["data.cache_mib=512", "train.steps=3"],
    )
    folder = train(config, progress=False)
    assert (folder / "checkpoints" / "step-3").is_dir()
    assert f"10 of {FILES - FILES // EVERY} rows have a value that counts as absent" in caplog.text
