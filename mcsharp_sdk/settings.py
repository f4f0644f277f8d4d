"""What all settings in a recipe have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError


def refuse_truth_for_number(cls: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """A validator: YAML reads a plain ``yes`` or ``on`` as true, and Python takes that for 1."""
    kinds = list(_kinds(cls.model_fields[str(info.field_name)].annotation))
    if bool in kinds or not (int in kinds or float in kinds):
        return value
    if isinstance(value, bool):
        raise PydanticKnownError("int_type" if int in kinds else "float_type")
    return _truth_as_text(value)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is put together from."""
    yield annotation
    for part in get_args(annotation):
        yield from [type(part)] if get_origin(annotation) is Literal else _kinds(part)


def _truth_as_text(value: Any) -> Any:
    """The value with ``true`` and ``false`` inside of it as texts, which no number is read from."""
    if isinstance(value, Mapping):
        return {_truth_as_text(key): _truth_as_text(inside) for key, inside in value.items()}
    if isinstance(value, (list, tuple)):
        return [_truth_as_text(inside) for inside in value]
    return str(value).lower() if isinstance(value, bool) else value


class Settings(BaseModel):
    """Settings that cannot change and know no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    _numbers = field_validator("*", mode="before")(refuse_truth_for_number)
