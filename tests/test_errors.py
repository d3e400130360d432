"""Where an error stands: `at` puts outer keys before inner ones, and what an error says survives its pickling."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from mmdiff.errors import InputError, at


@pytest.mark.parametrize(
    ("place", "key"),
    [
        ({"prefix": "modalities.label"}, "modalities.label.scale"),
        ({"prefix": "row 3", "join": ": "}, "row 3: scale"),
        ({"prefix": "observed.label", "join": None}, "observed.label"),
        ({"prefix": "scheduler", "keys": {"scale": "modalities.label.weight.scale"}}, "modalities.label.weight.scale"),
        ({"prefix": "scheduler", "keys": {"sca": "no"}}, "scheduler.scale"),
        ({}, "scale"),
    ],
)
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("raised_everywhere", [True, False])
def test_a_place_changes_the_key_alone(
    place: dict[str, Any], key: str, everywhere: bool, raised_everywhere: bool
) -> None:
    with pytest.raises(InputError) as caught, at(**place, everywhere=everywhere):
        raise InputError("scale", -1, "must be positive", everywhere=raised_everywhere)
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert (error.key, error.value, error.remedy) == (key, -1, "must be positive")
        assert error.everywhere is (everywhere and raised_everywhere)
        assert str(error) == f"{key} = -1: must be positive"
