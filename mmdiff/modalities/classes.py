"""Classes of a column: which raw values there are, how often, and what they are called."""

from __future__ import annotations

import numbers
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from mmdiff.errors import InputError

_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # categories of characters that a terminal obeys instead of showing
_JOINERS = "\u200c\u200d"  # that some scripts need
_FEW = 8  # rows of a column too short to judge
_COMPACT = "set classes: compact to keep those that have rows"


def whole_number(raw: Any) -> int | None:
    """An integer, or a float that is one, as an int; None for anything else, a bool too."""
    if isinstance(raw, bool) or not isinstance(raw, numbers.Real | Decimal):
        return None
    return int(raw) if raw == raw and abs(raw) != float("inf") and raw == int(raw) else None


def check_names(names: Sequence[str] | None, count: int) -> None:
    """Names of classes are ``count`` different texts that can be shown.

    Raises:
        InputError: naming what is wrong.
    """
    if names is None:
        return
    if isinstance(names, str) or len(names) != count:
        raise InputError("names", names, f"needs {count} entries, one per class")
    for name in names:
        if not isinstance(name, str) or not name:
            raise InputError("names", name, "is no text that can be shown; set unknown: … where it means missing")
        if any(unicodedata.category(c) in _UNSEEN and c not in _JOINERS for c in name):
            raise InputError("names", name, "a class name holds control characters; rename it")
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise InputError("names", repeated[0], "names two classes; names must differ")


def listed(things: Sequence[Any], most: int = 10) -> str:
    """The first of several things, with commas."""
    return ", ".join(str(thing) for thing in things[:most]) + (", …" if len(things) > most else "")


def counted(key: str, values: Iterable[Any]) -> Counter:
    """How often each class of a column occurs: texts, truth values, or ids.

    Raises:
        InputError: for values that are no classes, and for a column of several types.
    """
    counts = Counter(_class(key, value) for value in values)
    kinds = {type(value).__name__ for value in counts}
    if len(kinds) != 1:
        text = ", ".join(sorted(kinds)) or None
        raise InputError(key, text, "is no column of class ids or names; check data.columns")
    return counts


def _class(key: str, value: Any) -> str | bool | int:
    if isinstance(value, str | bool):
        return value
    number = whole_number(value)
    if number is None:
        text = value if isinstance(value, numbers.Real | Decimal) else type(value).__name__
        raise InputError(key, text, "is no class: ids are whole numbers, names are texts; check data.columns")
    return number


def classes_of(
    counts: Mapping[Any, int], names: Sequence[str] | None, num_classes: int | None, compact: bool
) -> dict[str, Any]:
    """`num_classes`, `names`, `ids` and `show` of a column of labels.

    Args:
        counts: {raw value: rows}, not empty, of one type.
        names: of the classes, where the config or the data name them.
        num_classes: what the config sets.
        compact: whether classes are those that have rows.
    """
    kind = type(next(iter(counts)))
    if kind is str:
        settings = _by_text(counts, names, compact)
    elif kind is bool:
        settings = _by_id({int(value): rows for value, rows in counts.items()}, ["false", "true"], compact)
    else:
        settings = _by_id(counts, names, compact)
    count = settings["num_classes"]
    if num_classes not in (None, count):
        raise InputError("num_classes", num_classes, f"the column has {count} classes; leave it out")
    return settings


def _by_text(counts: Mapping[str, int], names: Sequence[str] | None, compact: bool) -> dict[str, Any]:
    present = sorted(counts)
    if names is not None and (strange := [name for name in present if name not in names]):
        raise InputError("label", strange[0], f"is none of names: {listed(names)}")
    if names is not None and compact:
        raise InputError("classes", "compact", "texts come with their own names; leave names out")
    if names is None and not compact:
        _check_many(len(present), sum(counts.values()))
    return {"num_classes": len(names or present), "names": list(names or present), "show": "name"}


def _by_id(counts: Mapping[int, int], names: Sequence[str] | None, compact: bool) -> dict[str, Any]:
    present = sorted(counts)
    if compact:
        kept = {} if names is None else {"names": [_name(names, k) for k in present]}
        return {"num_classes": len(present), "ids": present, **kept}
    if present[0] < 0:
        raise InputError("label", present[0], f"is no class id; set unknown: {present[0]}, or classes: compact")
    count = max(present[-1] + 1, len(names or ()))
    if names is not None and count > len(names):
        raise InputError("label", present[-1], f"is outside 0 … {len(names) - 1}, the classes that have names")
    rows = sum(counts.values())
    if names is None:
        _check_many(count, rows)
    if rows > 2 * count and (empty := [k for k in range(count) if k not in counts]):
        text = listed([names[k] if names else k for k in empty])
        raise InputError("label", text, f"no row has these classes; {_COMPACT}, or num_classes: {count} to keep all")
    return {"num_classes": count} | ({} if names is None else {"names": list(names)})


def _name(names: Sequence[str], index: int) -> str:
    if not 0 <= index < len(names):
        raise InputError("label", index, f"has no name among the {len(names)} of the classes")
    return names[index]


def _check_many(count: int, rows: int) -> None:
    if 2 * count > rows >= _FEW:
        remedy = f"is more than half of the {rows} rows that have a label; choose another column, or {_COMPACT}"
        raise InputError("label", f"{count} classes", remedy)
