"""The parts of a recipe that come in several kinds, each validated as its own class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args

from mcsharp_exporters.base import Exporter
from pydantic import (
    BaseModel,
    PlainValidator,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from mcsharp_sdk.data.calibration import Calibration, share_sequences
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.recipe.document import Location, suggestion
from mcsharp_sdk.recipe.registry import EXPORTERS, MODIFIERS, PluginError

MESSAGE = "recipe_message"
"""Error type of messages that are meant for people as they are."""


def errors_at(*found: tuple[Location, str]) -> ValidationError:
    """A validation error with messages of our own at locations below the value being validated."""
    details = [
        InitErrorDetails(
            type=PydanticCustomError(MESSAGE, "{message}", {"message": message}),
            loc=location,
            input=None,
        )
        for location, message in found
    ]
    return ValidationError.from_exception_data("recipe", details)


def calibration_kinds() -> dict[str, type[BaseModel]]:
    """Value of ``source`` -> the class of its settings."""
    union, *_ = get_args(Calibration)
    return {kind.model_fields["source"].default: kind for kind in get_args(union)}


def _calibration_class(source: str) -> type[BaseModel]:
    kinds = calibration_kinds()
    if source not in kinds:
        near = suggestion(source, kinds, otherwise="there are ")
        raise PluginError(f"unknown source '{source}'{near}")
    return kinds[source]


def _picker(
    key: str,
    base: type[BaseModel],
    load: Callable[[str], type[BaseModel]],
    names: Callable[[], Any],
) -> Callable[[Any, ValidationInfo], Any]:
    """A validator that takes the class from the value's ``key`` and validates the value with it."""

    def pick(value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, base):
            return value
        if not isinstance(value, Mapping):
            raise errors_at(((), f"should be a mapping such as {{{key}: {next(iter(names()))}}}"))
        name = value.get(key)
        if name is None:
            choice = ", ".join(names())
            raise errors_at(((key,), f"required, but not given; there are {choice}"))
        if not isinstance(name, str):
            raise errors_at(((key,), f"should be a name, not {name!r}"))
        try:
            found = load(name)
        except PluginError as error:
            raise errors_at(((key,), str(error))) from None
        return found.model_validate(dict(value), context=info.context)

    return pick


pick_stage = _picker("type", Modifier, MODIFIERS.load, MODIFIERS.names)
pick_export = _picker("type", Exporter, EXPORTERS.load, EXPORTERS.names)
pick_source = _picker("source", BaseModel, _calibration_class, calibration_kinds)

_SOURCES: TypeAdapter[tuple[Any, ...]] = TypeAdapter(
    tuple[Annotated[Any, PlainValidator(pick_source)], ...]
)


def pick_calibration(value: Any, info: ValidationInfo) -> Any:
    """One source, or a list of them, in which each is given its number of sequences."""
    if not isinstance(value, (list, tuple)):
        source = pick_source(value, info)
        if source.weight is not None:
            raise errors_at((("weight",), "has a meaning only in a list of sources"))
        return source
    if not value:
        raise errors_at(((), "the list is empty: give at least one source"))
    sources = _SOURCES.validate_python(value, context=info.context)
    twice = [
        ((index, "weight"), "'sequences' says how many already: give one of the two")
        for index, source in enumerate(sources)
        if source.weight is not None and "sequences" in source.model_fields_set
    ]
    if twice:
        raise errors_at(*twice)
    return share_sequences(sources)


Stage = Annotated[SerializeAsAny[Modifier], PlainValidator(pick_stage)]
Export = Annotated[SerializeAsAny[Exporter], PlainValidator(pick_export)]
CalibrationSettings = Annotated[
    SerializeAsAny[Calibration | tuple[Calibration, ...]], PlainValidator(pick_calibration)
]


_KINDS: dict[str | int, tuple[str, Callable[[str], type[BaseModel]]]] = {
    "calibration": ("source", _calibration_class),
    "stages": ("type", MODIFIERS.load),
    "exports": ("type", EXPORTERS.load),
}
"""Key of a recipe -> the key that names the class of its part or parts, and the class."""


def settings_class(location: Location, data: Any) -> type[BaseModel] | None:
    """The class that describes the entry at ``location`` of a recipe's data, where there is one."""
    if not location or location[0] not in _KINDS:
        return None
    key, load = _KINDS[location[0]]
    try:
        entry = data
        depth = 2 if isinstance(data[location[0]], (list, tuple)) else 1
        for part in location[:depth]:
            entry = entry[part]
        found = type(entry) if isinstance(entry, BaseModel) else load(str(entry[key]))
    except (LookupError, TypeError, PluginError):
        return None
    return _below(found, location[depth:])


def _below(found: type[BaseModel], location: Location) -> type[BaseModel] | None:
    """The class of the settings nested at ``location`` in ``found``."""
    for part in location:
        field = found.model_fields.get(str(part))
        if field is None:
            continue
        nested = _models(field.annotation)
        if not nested:
            return None
        found = nested[0]
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models(part)]
