"""What all sections of a config share: strict models, ranges, folder names."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from mmdiff.errors import printable

Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(ge=0, le=1e4)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
_NUMBERS = (int, float, int | None, float | None)


def folder_name(name: str) -> str:
    """Refuse names with separators or control characters, and hidden ones."""
    if not name or set(name) & set("/\\") or name.startswith(".") or len(name) > 200 or printable(name) != name:
        raise ValueError("must be usable as a folder name: no slashes, no control characters, no dot in front")
    return name


FolderName = Annotated[str, AfterValidator(folder_name)]


class Base(BaseModel):
    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation in _NUMBERS:
            raise ValueError("must be a number")
        return value


class Strict(Base):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Open(Base):
    """Further keys are constructor arguments of the class that `kind` names; `mmdiff.resolve` checks them."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    def settings(self) -> dict[str, Any]:
        """The further keys."""
        return dict(self.model_extra or {})
