"""The picture below the Python of README.md, drawn by that very code, in a folder with runs/digits.

    python docs/pictures/digits.py --out docs/images/digits.png
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

README = Path(__file__).parents[2] / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(description="The picture below the Python of README.md.")
    parser.add_argument("--out", type=Path, required=True, help="the PNG")
    out = parser.parse_args().out
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[1], names)
    rows = [
        ("drawn together", names["joint"]["image"], names["joint"]["label"]),
        ("label = 3 given", names["threes"], names["labels"]),
    ]
    figure, axes = plt.subplots(2, 8, figsize=(7.6, 2.6), dpi=100)
    for (title, images, labels), fields in zip(rows, axes, strict=True):
        fields[0].set_ylabel(title, fontsize=9)
        for field, image, label in zip(fields, images, labels, strict=True):
            field.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            field.set_title(f"label {label}", fontsize=9)
            field.set(xticks=[], yticks=[])
    figure.tight_layout(pad=0.5)
    figure.savefig(out)


if __name__ == "__main__":
    main()
