"""What a person did wrong is one line: `InputError` with the key, and the value where it can be named."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import ANY

import pytest

from mmdiff.errors import InputError


@contextlib.contextmanager
def refused(key: str, value: Any = ANY, *facts: str) -> Iterator[None]:
    """What runs within must raise one `InputError` of one line.

    Args:
        key: of the error.
        value: of the error.
        facts: names and numbers that the line must hold; never its wording.
    """
    with pytest.raises(InputError) as caught:
        yield
    error, line = caught.value, str(caught.value)
    assert (key, value) == (error.key, error.value), line  # this order: a tensor has no ==
    assert "\n" not in line and all(fact in line for fact in facts), line
