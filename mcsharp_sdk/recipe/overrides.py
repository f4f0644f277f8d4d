"""Settings changed for one call: ``stages.BitAllocation.target_bits=2.0``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcsharp_sdk.arguments import text_list
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.recipe.document import Document, Finding, Location, Place, path_text, suggestion
from mcsharp_sdk.recipe.yaml_text import parse_value

_STEP = re.compile(r"\.?(?:\[(?P<index>[0-9]{1,6})\]|(?P<name>[^.\[\]=]+))")
_PAIR = re.compile(r"\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}")
"""A character that JSON writes as two; YAML has another escape for it."""

Overrides = Sequence[str] | Mapping[str, Any]
"""Texts such as ``stages.BitAllocation.target_bits=2.0``, or target -> plain value."""


class BadOverride(ValueError):
    """An override that cannot be read, or whose target is not there, and what to do."""


@dataclass(frozen=True)
class Override:
    """One assignment: ``text`` as given, the steps to its target, and the new value."""

    text: str
    steps: tuple[str, ...]
    value: Any


def override_texts(overrides: Overrides) -> list[str]:
    """Overrides as texts.

    Raises
    ------
    InputError
        If they are neither texts nor a mapping of plain data.
    """
    if not isinstance(overrides, Mapping):
        return text_list(overrides, "overrides")
    for target in overrides:
        if not isinstance(target, str):
            raise InputError(f"overrides: {target!r} is no setting: name one by a text")
    try:
        return [f"{target}={value_text(value)}" for target, value in overrides.items()]
    except (TypeError, ValueError) as error:
        raise InputError(f"overrides: a value is no plain data: {error}") from None


def value_text(value: Any) -> str:
    """A plain value as the text that an override has for it.

    Raises
    ------
    TypeError, ValueError
        If it is no plain data.
    """
    text = json.dumps(str(value) if isinstance(value, Path) else value, allow_nan=False)
    return _PAIR.sub(_one_escape, text)


def _one_escape(pair: re.Match[str]) -> str:
    character = json.loads(f'"{pair[0]}"')
    return f"\\U{ord(character):08x}"


def parse_override(text: str) -> Override:
    """Read ``target=value``; the value is YAML, e.g. ``2.0``, ``gptq``, ``[1, 2]``.

    Raises
    ------
    BadOverride
    """
    target, equals, written = text.partition("=")
    if not equals or not target.strip():
        raise BadOverride("write it as target=value, e.g. stages.BitAllocation.target_bits=2.0")
    try:
        value = parse_value(written)
    except ValueError as error:
        raise BadOverride(f"the value cannot be read: {error}") from None
    return Override(text, tuple(_steps(target.strip())), value)


def _steps(target: str) -> Iterator[str]:
    position = 0
    while position < len(target):
        match = _STEP.match(target, position)
        if match is None:
            raise BadOverride(f"'{target}' is no target: write e.g. stages[1].target_bits")
        yield match["index"] or match["name"]
        position = match.end()


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Change the document's data; overrides that do not fit become findings.

    Each changed entry is placed at its override, so that later findings about it say so.
    """
    for text in overrides:
        try:
            override = parse_override(text)
            location = _target(document.data, override.steps)
            _assign(document.data, location, override.value)
        except BadOverride as error:
            document.findings.append(Finding((), str(error), override=text))
            continue
        document.forget(location)
        document.places[location] = Place(0, 0, text)
        document.changed = True


def _target(data: Any, steps: Sequence[str]) -> Location:
    """Where the steps lead in the data; the last may name a setting that is not written yet."""
    location: Location = ()
    for step in steps[:-1]:
        if not location and (meant := _list_with(data, step)):
            raise BadOverride(
                f"the recipe has no '{step}'; did you mean {meant}.{'.'.join(steps)}?"
            )
        location = (*location, _existing(data, step, location))
        data = data[location[-1]]
    if isinstance(data, dict):
        return (*location, steps[-1])
    return (*location, _existing(data, steps[-1], location))


def _list_with(data: Any, kind: str) -> str:
    """Key of the list of the recipe that has an item of a type (or source); empty if none has."""
    parts = data.items() if isinstance(data, dict) and kind not in data else ()
    return next((key for key, items in parts if kind in _types(items)), "")


def _types(items: Any) -> list[Any]:
    """The type (or source) of each item of a list; of anything else, none."""
    return [
        item.get("type", item.get("source")) if isinstance(item, dict) else None
        for item in (items if isinstance(items, list) else ())
    ]


def _existing(data: Any, step: str, location: Location) -> str | int:
    where = path_text(location) or "the recipe"
    if isinstance(data, list):
        return _item(data, step, where)
    if not isinstance(data, dict):
        raise BadOverride(f"{where} has no entries, so there is no '{step}' in it")
    if step not in data:
        near = suggestion(step, data, otherwise="there are ")
        raise BadOverride(f"{where} has no '{step}'{near}")
    return step


def _item(items: list[Any], step: str, where: str) -> int:
    """The index that a step means: a number, or the type (or source) that no other item has."""
    if step.isdecimal() and step.isascii():
        if int(step) < len(items):
            return int(step)
        raise BadOverride(f"{where} has {len(items)} entries, counted from 0: there is no [{step}]")
    types = _types(items)
    found = [index for index, kind in enumerate(types) if kind == step]
    if len(found) == 1:
        return found[0]
    if found:
        choice = " or ".join(f"{where}[{index}]" for index in found)
        raise BadOverride(f"{where} has {len(found)} of type '{step}': write {choice}")
    near = suggestion(step, {t for t in types if isinstance(t, str)}, otherwise="there are ")
    raise BadOverride(f"{where} has no '{step}'{near}")


def _assign(data: Any, location: Location, value: Any) -> None:
    for part in location[:-1]:
        data = data[part]
    data[location[-1]] = value
