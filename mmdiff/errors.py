"""The one exception for input that cannot be used: it names the key, the value and the remedy in a single line."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from a person: a config key, a command-line argument, a data row, a file.

    Args:
        key: where the value came from, for example ``"modalities.label.weight.scale"``.
        value: the offending value.
        remedy: what is wrong and what to do about it.
    """

    def __init__(self, key: str, value: object, remedy: str) -> None:
        self.key, self.value, self.remedy = key, value, remedy
        self.everywhere = True  # whether every process of a run meets it, as with a config; False for a data row
        shown = repr(value) if len(repr(value)) <= 120 else repr(value)[:117] + "..."
        super().__init__(f"{key} = {shown}: {remedy}".replace("\n", " "))

    def __reduce__(self) -> tuple:  # survives the trip out of a data worker
        return type(self), (self.key, self.value, self.remedy)
