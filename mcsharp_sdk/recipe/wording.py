"""What pydantic finds wrong with a recipe, said for people and placed in the recipe's data."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mcsharp_sdk.recipe.document import Finding, Location, suggestion
from mcsharp_sdk.recipe.elements import MESSAGE, settings_class

_INTEGER = "should be a whole number"
_NUMBER = "should be a number"
_TRUTH = "should be true or false"
_TEXT = "should be text"
_LIST = "should be a list"
_MAPPING = "should be a mapping of settings"
_FILE = "should be a file name"

_MISMATCH = {
    "int_type": _INTEGER,
    "int_parsing": _INTEGER,
    "int_parsing_size": _INTEGER,
    "int_from_float": _INTEGER,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "should be a finite number",
    "bool_type": _TRUTH,
    "bool_parsing": _TRUTH,
    "string_type": _TEXT,
    "list_type": _LIST,
    "tuple_type": _LIST,
    "set_type": _LIST,
    "dict_type": _MAPPING,
    "mapping_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "path_type": _FILE,
    "none_required": "should be null",
}
"""Error types that say that the value is of the wrong kind -> what it should be."""

_RANGE = {
    "greater_than": "should be greater than {gt}",
    "greater_than_equal": "should be at least {ge}",
    "less_than": "should be less than {lt}",
    "less_than_equal": "should be at most {le}",
    "multiple_of": "should be a multiple of {multiple_of}",
    "too_short": "should have at least {min_length} entries",
    "too_long": "should have at most {max_length} entries",
    "string_too_short": "should have at least {min_length} characters",
    "string_too_long": "should have at most {max_length} characters",
    "string_pattern_mismatch": "should match the pattern {pattern}",
}
"""Error types that say that the value is out of bounds -> the bounds."""


def explain(error: ValidationError, data: Any, root: type[BaseModel]) -> list[Finding]:
    """One finding for each entry of ``data`` that the error is about.

    Where a setting takes several kinds of values, pydantic reports each kind that it tried; they
    become one finding, without "wrong kind" where the value was of the right kind for one of them.
    """
    findings = []
    grouped: dict[Location, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        if details["type"] == MESSAGE:
            findings.append(Finding(details["loc"], details["msg"]))
        else:
            grouped.setdefault(_locate(details, data), []).append(details)
    findings += [
        _finding(place, tried, data, root)
        for place, tried in grouped.items()
        if not (all(map(_of_another_kind, tried)) and _has_error_inside(place, grouped))
    ]
    misspelt = {
        (*f.location[:-1], near[1]) for f in findings if (near := _MISSPELT.match(f.message))
    }
    return [f for f in findings if f.location not in misspelt or f.message != _MISSING]


def _of_another_kind(details: ErrorDetails) -> bool:
    """Whether the value is not even of the kind that was tried."""
    chosen = details["type"] == "literal_error" and isinstance(details["input"], (Mapping, list))
    return chosen or details["type"] in _MISMATCH


def _has_error_inside(place: Location, others: Iterable[Location]) -> bool:
    """Whether there is an error further inside: the value was of the right kind for that."""
    return any(len(other) > len(place) and other[: len(place)] == place for other in others)


_MISSING = "required, but not given"
_NO_SUCH = "no such setting"
_MISSPELT = re.compile(rf"{_NO_SUCH}; did you mean '(.+)'\?")


def _finding(
    location: Location, tried: list[ErrorDetails], data: Any, root: type[BaseModel]
) -> Finding:
    closer = [details for details in tried if not _of_another_kind(details)] or tried
    messages = dict.fromkeys(_message(location, details, data, root) for details in closer)
    wrong = ", or ".join(messages)
    if closer[0]["type"] in (*_MISMATCH, *_RANGE) and _is_short(closer[0]["input"]):
        wrong += f", not {_shown(closer[0]['input'])}"
    return Finding(location, wrong, of_key=closer[0]["type"] == "extra_forbidden")


def _locate(details: ErrorDetails, data: Any) -> Location:
    """Where in ``data`` the error is: pydantic's location without the kinds of values it tried."""
    location: list[str | int] = []
    at_end = details["type"] == "missing"
    written = details["loc"]
    for index, part in enumerate(written):
        inside = _step(data, part)
        if inside is not _NOTHING:
            location.append(part)
            data = inside
        elif at_end and index == len(written) - 1:
            location.append(part)
    if details["type"] == "value_error" and (named := _NAMED.match(_cause(details))):
        field = named["setting"]
        if isinstance(data, Mapping) and field in data:
            location.append(field)
    return tuple(location)


_NAMED = re.compile(r"(?P<setting>[a-z_][a-z0-9_]*)(?P<rest>[ =:].*)", re.DOTALL)
"""A validator's message that starts with the name of the setting it is about."""

_NOTHING = object()


def _step(data: Any, part: str | int) -> Any:
    if isinstance(data, Mapping):
        return data.get(part, _NOTHING)
    if isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data):
        return data[part]
    return _NOTHING


def _message(location: Location, details: ErrorDetails, data: Any, root: type[BaseModel]) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return _no_such_setting(location, data, root)
    if kind == "missing":
        return _MISSING
    if kind in ("literal_error", "enum"):
        return _not_a_choice(details["input"], str(context.get("expected", "")))
    if kind in ("value_error", "assertion_error"):
        return _own_words(location, _cause(details))
    if kind in _MISMATCH:
        return _MISMATCH[kind]
    if kind in _RANGE:
        return _RANGE[kind].format_map(context)
    return details["msg"].removeprefix("Input ")


def _cause(details: ErrorDetails) -> str:
    cause = details.get("ctx", {}).get("error")
    return str(cause) if cause is not None else details["msg"]


def _own_words(location: Location, cause: str) -> str:
    """A validator's message, without the setting's name where the location already ends in it."""
    named = _NAMED.match(cause)
    if named is None or not location or named["setting"] != location[-1]:
        return cause
    rest = named["rest"].lstrip(" =:")
    return cause if rest.startswith(("and ", "or ")) else rest


def _no_such_setting(location: Location, data: Any, root: type[BaseModel]) -> str:
    if len(location) == 1 and (targets := _targets(str(location[0]), data)):
        return f"{_NO_SUCH}; did you mean {' or '.join(map(repr, targets))}?"
    owner = root if len(location) == 1 else settings_class(location[:-1], data)
    if owner is None:
        return _NO_SUCH
    names = owner.model_fields
    return _NO_SUCH + suggestion(str(location[-1]), names, otherwise="there are ")


def _targets(setting: str, data: Any) -> list[str]:
    """Where stages and exporters of a recipe have a setting, as ``stages.TYPE.setting``."""
    found = []
    for part in ("stages", "exports"):
        items = data.get(part) if isinstance(data, Mapping) else None
        for index, item in enumerate(items if isinstance(items, list) else ()):
            owner = settings_class((part, index), data)
            if owner is not None and setting in owner.model_fields:
                kind = item["type"] if isinstance(item, Mapping) else owner.__name__
                found.append(f"{part}.{kind}.{setting}")
    return found


def _not_a_choice(value: Any, expected: str) -> str:
    choices: Iterable[str] = re.findall(r"'([^']*)'", expected)
    near = suggestion(value, choices) if isinstance(value, str) else ""
    shown = f", not {_shown(value)}" if _is_short(value) else ""
    return f"should be {expected}{shown}{near}"


def _is_short(value: Any) -> bool:
    return isinstance(value, str) or not isinstance(value, Collection)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = value if len(str(value)) <= 40 else f"{str(value)[:37]}..."
    return repr(text)
