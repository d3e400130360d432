"""What all sections of a config share: strict models, ranges, folder names."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from mmdiff.errors import printable

Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(ge=0, le=1e4)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def folder_name(name: str) -> str:
    """Refuse names with separators or control characters, and hidden ones."""
    if not name or set(name) & set("/\\") or name.startswith(".") or len(name) > 200 or printable(name) != name:
        raise ValueError("must be usable as a folder name: no slashes, no control characters, no dot in front")
    return name


FolderName = Annotated[str, AfterValidator(folder_name)]


_NUMBERS = {int, float, type(None)}


def _plain(annotation: Any) -> set[Any]:
    """The types of a union, without what is annotated to them."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_plain, get_args(annotation)))
    return {annotation if isinstance(annotation, type) else object}


class Base(BaseModel):
    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and _plain(cls.model_fields[info.field_name or ""].annotation) <= _NUMBERS:
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
