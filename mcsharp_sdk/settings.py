"""What all settings in a recipe have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError


def refuse_truth_for_number(cls: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """A validator: YAML reads a plain ``yes`` or ``on`` as true, and Python takes that for 1."""
    kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
    if bool not in kinds and kinds & {int, float} and _has_truth(value):
        raise PydanticKnownError("int_type" if int in kinds else "float_type")
    return value


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is put together from."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def _has_truth(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_truth, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_truth, value))
    return isinstance(value, bool)


class Settings(BaseModel):
    """Settings that cannot change and know no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    _numbers = field_validator("*", mode="before")(refuse_truth_for_number)
