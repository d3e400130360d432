"""What goes wrong, said in one line: input by key, value and remedy; training that cannot go on."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Iterator, Mapping


class InputError(ValueError):
    """Bad input from a person: a config key, a command-line argument, a data row, a file.

    Args:
        key: where the value came from, for example ``"modalities.label.weight.scale"``.
        value: the offending value.
        remedy: what is wrong and what to do about it.
        everywhere: whether every process of a run meets it, as with a config; False for a data row.
    """

    def __init__(self, key: str, value: object, remedy: str, everywhere: bool = True) -> None:
        self.key, self.value, self.remedy, self.everywhere = key, value, remedy, everywhere
        shown = _shown(value)
        super().__init__(printable(f"{key} = {shown}: {remedy}".replace("\n", " ")))

    def __reduce__(self) -> tuple:  # survives the trip out of a data worker
        return type(self), (self.key, self.value, self.remedy, self.everywhere)


def _shown(value: object) -> str:
    """A value's own text, of a long one the two ends: a path ends with its file's name. Its type where it has none."""
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 160 else f"{text[:60]} … {text[-97:]}"


def printable(text: str, keep: str = "") -> str:
    """A text with its control characters written out, as no terminal should obey the names in a file.

    Args:
        text: any.
        keep: control characters that stay, for example line breaks.
    """
    return "".join(c if c in keep or not _controls(c) else repr(c)[1:-1] for c in text)


def _controls(character: str) -> bool:
    """Control, format and surrogate characters, and separators of lines."""
    category = unicodedata.category(character)
    return category[0] == "C" or category in ("Zl", "Zp")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and why.

    Args:
        message: one line.
        everywhere: whether every process of a run meets it, as with the loss.
    """

    def __init__(self, message: str, everywhere: bool = True) -> None:
        self.everywhere = everywhere
        super().__init__(message)


@contextlib.contextmanager
def at(
    prefix: str = "", join: str | None = ".", keys: Mapping[str, str] | None = None, everywhere: bool = True
) -> Iterator[None]:
    """Say where: an `InputError` raised within gets ``prefix`` before its key.

    Args:
        prefix: the outer key, for example ``"modalities.label"``.
        join: what stands between the two keys; with None the prefix takes the place of the key.
        keys: {inner key: whole key} of those that are called otherwise outside.
        everywhere: False where only this process can meet the error.
    """
    try:
        yield
    except InputError as error:
        own = prefix if join is None else f"{prefix}{join}{error.key}" if prefix else error.key
        key = (keys or {}).get(error.key, own)
        raise InputError(key, error.value, error.remedy, error.everywhere and everywhere) from error
