"""Grids of images with titles, captions and a legend; their pixels are those of the samples."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmdiff.modalities.base import Modality
from mmdiff.modalities.label import Label
from mmdiff.model import MTDiffusionModel

FONT_SIZE = 11
LINES = 5  # of the text below a sample, at most


class Legend(NamedTuple):
    """One entry below a grid."""

    swatch: Image.Image
    text: str


def pictures(name: str, values: list[Any], names: list[str] | None = None) -> tuple[list[Image.Image], list[Legend]]:
    """Samples as images: images stay, maps of numbers are coloured over their common range, others give none.

    Args:
        name: of the modality, for the legend.
        values: of `Modality.postprocess`.
        names: of the classes, for the legend of ids.
    """
    if is_map(values[0]):
        return _coloured(name, values)
    if not isinstance(values[0], Image.Image):
        return [], []
    if values[0].mode == "I;16":  # ids above 255, for which a palette has no colours
        return _coloured(name, [np.asarray(value)[None] for value in values])
    return values, _legend_of_ids(name, values, names) if values[0].mode == "P" else []


def is_map(value: Any) -> bool:
    """Whether a sample is a map of numbers (channels, h, w)."""
    return isinstance(value, np.ndarray) and value.ndim == 3


def class_names(modality: Modality, values: list[Any]) -> list[str]:
    """Classes as texts: their names where they have some, else the ids as the data have them."""
    named = isinstance(modality, Label) and modality.names is not None
    names = dict(zip(modality.ids, modality.names, strict=True)) if named else {}
    return [str(names.get(value, value)) for value in values]


def _legend_of_ids(name: str, images: list[Image.Image], names: list[str] | None) -> list[Legend]:
    used = sorted({number for image in images for _, number in image.getcolors()})
    palette = np.asarray(images[0].getpalette()).reshape(-1, 3)
    texts = [names[k] if names and k < len(names) else str(k) for k in used]
    texts[0] = f"{name}: {texts[0]}"
    return [Legend(Image.new("RGB", (12, 12), tuple(palette[k])), text) for k, text in zip(used, texts, strict=True)]


def _coloured(name: str, maps: list[np.ndarray]) -> tuple[list[Image.Image], list[Legend]]:
    """The first channel of maps in viridis, and their colour bar."""
    from matplotlib import colormaps

    first = np.stack([one[0] for one in maps]).astype(np.float64)
    finite = first[np.isfinite(first)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    shares = (first.clip(low, high) - low) / (high - low or 1.0)
    colours = colormaps["viridis"]
    images = [Image.fromarray(colours(one, bytes=True)[..., :3].copy()) for one in shares]
    bar = Image.fromarray(np.repeat(colours(np.linspace(0, 1, 96), bytes=True)[None, :, :3], 12, axis=0))
    title = name if len(maps[0]) == 1 else f"{name}, channel 0"
    return images, [Legend(bar, f"{title}: {low:.3g} … {high:.3g}")]


def grid(
    rows: list[list[Image.Image]],
    columns: Sequence[str] = (),
    titles: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    legend: Sequence[Legend] = (),
    side: int = 48,
) -> Image.Image:
    """Rows of images with titles; the last row may be shorter.

    Args:
        rows: images of any mode; all are drawn at the size of the first.
        columns: a title per column; written upwards where one is too long.
        titles: a title per row.
        captions: a text below each image, or below each of several images in turn.
        legend: entries below the grid.
        side: small images are enlarged by a whole factor, to about this height.
    """
    flat = [image for row in rows for image in row]
    flat = flat if {image.mode for image in flat} == {"L"} else [image.convert("RGBA") for image in flat]
    zoom = max(1, side // flat[0].height)
    space = (flat[0].width * zoom + 2) * len(rows[0]) / len(captions[0]) if captions else 0
    lines = [[_wrapped(text, space) for text in texts] for texts in captions]
    below = max(len(text) for texts in lines for text in texts) * (FONT_SIZE + 2) + 2 if captions else 0
    body = tile(flat, len(rows[0]), zoom=zoom, below=below)
    if not (columns or titles or captions or legend):
        return body
    font, step, pitch = _font(), (body.width - 2) / len(rows[0]), (body.height - 2) / len(rows)
    upright = any(font.getlength(title) > step for title in columns)
    left = 8 + max(map(_width, titles)) if titles else 0
    top = (8 + max(map(_width, columns)) if upright else FONT_SIZE + 8) if columns else 0
    foot = _legend_strip(legend, left + body.width)
    canvas = Image.new("RGB", (left + body.width, top + body.height + foot.height), "white")
    canvas.paste(body, (left, top))
    canvas.paste(foot, (0, top + body.height))
    draw = ImageDraw.Draw(canvas)
    for index, title in enumerate(titles):
        centre = top + (index + 0.5) * pitch - below / 2
        draw.text((left - 4, centre), title, fill="black", font=font, anchor="rm")
    for index, title in enumerate(columns):
        centre = left + 2 + (index + 0.5) * step
        if upright:
            _write_upwards(canvas, title, (centre, top))
        else:
            draw.text((centre, top / 2), title, fill="black", font=font, anchor="mm")
    for row, texts in enumerate(lines):
        for index, text in enumerate(texts):
            for number, line in enumerate(text):
                height = top + (row + 1) * pitch - below + 1 + (number + 0.5) * (FONT_SIZE + 2)
                draw.text((left + (index + 0.5) * space, height), line, fill="black", font=font, anchor="mm")
    return canvas


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), FONT_SIZE)


def _width(text: str) -> int:
    return math.ceil(_font().getlength(text))


def _wrapped(text: str, width: float) -> list[str]:
    """The lines of a text, `LINES` at most; one that is too long is shortened."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if _width(longer) <= width or not lines[-1] else [*lines, word]
    kept = [*lines[: LINES - 1], " ".join(lines[LINES - 1 :])] if len(lines) > LINES else lines
    return [_shortened(line, width) for line in kept]


def _shortened(text: str, width: float) -> str:
    while len(text) > 1 and _width(text) > width:
        text = text[:-2] + "…"
    return text


def _write_upwards(canvas: Image.Image, text: str, bottom: tuple[float, int]) -> None:
    strip = Image.new("RGB", (bottom[1], FONT_SIZE + 4), "white")
    ImageDraw.Draw(strip).text((4, strip.height / 2), text, fill="black", font=_font(), anchor="lm")
    canvas.paste(strip.rotate(90, expand=True), (round(bottom[0] - strip.height / 2), 0))


def _legend_strip(legend: Sequence[Legend], width: int) -> Image.Image:
    """Entries from left to right, in as many lines as they need."""
    places, x, y, line = [], 4, 4, FONT_SIZE + 6
    for entry in legend:
        length = entry.swatch.width + 4 + _width(entry.text)
        if x > 4 and x + length > width:
            x, y = 4, y + line
        places.append((x, y))
        x += length + 10
    strip = Image.new("RGB", (width, y + line if legend else 0), "white")
    draw = ImageDraw.Draw(strip)
    for entry, (x, y) in zip(legend, places, strict=True):
        strip.paste(entry.swatch, (x, y))
        text = _shortened(entry.text, width - x - entry.swatch.width - 4)
        draw.text((x + entry.swatch.width + 4, y + 6), text, fill="black", font=_font(), anchor="lm")
    return strip


def tile(images: list[Image.Image], columns: int, gap: int = 2, zoom: int = 1, below: int = 0) -> Image.Image:
    """Images of one size in rows of ``columns``, with a gap so that they do not run into each other.

    Args:
        images: of one size and mode.
        columns: images in a row.
        gap: pixels between images.
        zoom: the factor by which they are enlarged.
        below: white pixels below every row, for captions.
    """
    width, height = images[0].width * zoom, images[0].height * zoom
    rows = -(-len(images) // columns)
    grey = images[0].mode == "L"
    size = (columns * (width + gap) + gap, rows * (height + gap + below) + gap)
    canvas = Image.new("L" if grey else "RGB", size, 128 if grey else (128,) * 3)
    for row in range(rows if below else 0):
        end = (row + 1) * (height + gap + below) + gap
        canvas.paste("white", (0, end - below, size[0], end))
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        tile_ = image.resize((width, height), Image.Resampling.NEAREST)
        if tile_.mode in ("LA", "RGBA"):  # what is transparent shows the ground
            tile_ = Image.alpha_composite(Image.new("RGBA", tile_.size, (128,) * 3 + (255,)), tile_.convert("RGBA"))
        canvas.paste(tile_, (gap + column * (width + gap), gap + row * (height + gap + below)))
    return canvas


def table(columns: dict[str, list[Any]]) -> Image.Image:
    """A titled column per list of samples, a row per sample; ids and maps have one legend.

    Args:
        columns: {title: samples that can be seen}, lists of one length.
    """
    coloured = [title for title, values in columns.items() if is_map(values[0]) or values[0].mode in ("P", "I;16")]
    legend: list[Legend] = []
    if coloured:
        images, legend = pictures(", ".join(coloured), [value for title in coloured for value in columns[title]])
        count = len(images) // len(coloured)
        columns = columns | {title: images[i * count : (i + 1) * count] for i, title in enumerate(coloured)}
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return grid(rows, list(columns), legend=legend, side=96)


def sample_grid(
    model: MTDiffusionModel, samples: dict[str, list[Any]], columns: int, titles: Sequence[str] = ()
) -> Image.Image:
    """The samples of a pipeline in rows of ``columns``: what can be seen of a sample stands side by side.

    Args:
        model: that drew them.
        samples: {modality: values}; the anchor's are images.
        columns: samples in a row.
        titles: a title per row; without, the drawn classes stand below each sample.
    """
    order = [model.anchor, *(name for name in samples if name != model.anchor)]
    seen, legend = {}, []
    for name in order:
        images, entries = pictures(name, samples[name], model.modalities[name].names)
        seen |= {name: images} if images else {}
        legend += entries
    count = len(samples[model.anchor])
    starts = range(0, count, columns)
    abreast = list(zip(*seen.values(), strict=True))  # the images of each sample
    rows = [[image for images in abreast[i : i + columns] for image in images] for i in starts]
    classes = [class_names(model.modalities[n], samples[n]) for n in order if isinstance(samples[n][0], str | int)]
    texts = [", ".join(values) for values in zip(*classes, strict=True)] if not titles else []
    captions = [texts[i : i + columns] for i in starts] if texts else []
    heads = [name.replace("_", " ") for name in seen] * columns if len(seen) > 1 else []
    return grid(rows, heads, titles, captions, legend)
