"""Code of others, which a config names by import path."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from mmdiff.errors import InputError


def imported(key: str, path: str) -> Any:
    """What stands at "package.module:Name", or None where the module has nothing of that name; nothing is called.

    Raises:
        InputError: for a text that is no import path, or a module that cannot be imported.
    """
    module, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise InputError(key, path, "is no import path; write one as in my_pkg.depth:Depth")
    if "" not in sys.path:
        sys.path.append("")  # one's own files are found in the working directory, after what is installed
    try:
        return vars(importlib.import_module(module)).get(name)
    except ImportError as error:
        raise InputError(key, path, f"cannot be imported: {error}") from None
    except Exception as error:  # whatever the code of others raises
        raise InputError(key, path, f"cannot be imported: {type(error).__name__}: {error}") from None
