"""From a recipe's data to checked settings: every problem is found, then reported at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mcsharp_exporters.base import Exporter
from pydantic import BaseModel, TypeAdapter, ValidationError

from mcsharp_sdk.errors import InputProblems, Problem
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.recipe.consistency import misfits
from mcsharp_sdk.recipe.document import Document, Finding, Location, suggestion
from mcsharp_sdk.recipe.elements import Export, Stage, settings_class
from mcsharp_sdk.recipe.paths import BASE
from mcsharp_sdk.recipe.wording import explain
from mcsharp_sdk.recipe.yaml_text import MAX_CHARACTERS

Model = TypeVar("Model", bound=BaseModel)

_MAX_BYTES = 4 * MAX_CHARACTERS
"""A character takes at most four bytes."""


def read_text(path: Path) -> str:
    """The text of a recipe file.

    Raises
    ------
    InputProblems
        If there is no such file, or it is no text in UTF-8, or too large for a recipe.
    """
    raw = _read(path)
    if len(raw) > _MAX_BYTES:
        raise _unreadable(path, f"is larger than {_MAX_BYTES // 1024} KiB: this is no recipe")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _unreadable(path, "is not text in UTF-8", line) from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise _unreadable(path, f"there is no such file{_beside(path)}") from None
    except IsADirectoryError:
        raise _unreadable(path, "is a folder: give the recipe file in it") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, f"cannot be read: {error}") from None


def _unreadable(path: Path, message: str, line: int | None = None) -> InputProblems:
    where = path.name if line is None else f"{path.name}:{line}"
    return InputProblems(str(path), [Problem(where, message)])


def _beside(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.glob("*.y*ml")]
    except OSError:
        return ""
    return suggestion(path.name, names)


def checked(document: Document, base: Path, model: type[Model]) -> Model:
    """The document's data as ``model``, all parts fitting together.

    Raises
    ------
    InputProblems
        With everything that is wrong: YAML, overrides, settings, and what does not fit.
    """
    data = document.data
    if not isinstance(data, dict):
        if not document.findings:
            document.add((), _NO_RECIPE if data is None else _NO_MAPPING, line=1)
        raise document.error(document.findings)
    try:
        recipe = model.model_validate(data, context={BASE: base})
    except ValidationError as error:
        found = [*explain(error, data, model), *_partial_misfits(data, base)]
        raise document.error(_without_echoes(document.findings, found)) from None
    if document.findings:
        raise document.error(document.findings)
    return recipe


def checked_settings(document: Document, model: type[Model], elsewhere: Mapping[str, str]) -> Model:
    """The document's data as the settings of one stage or exporter.

    Parameters
    ----------
    elsewhere : settings that are not to be given here -> why.

    Raises
    ------
    InputProblems
        With everything that is wrong.
    """
    for name, reason in elsewhere.items():
        if name in document.data:
            document.add((name,), f"cannot be set here: {reason}")
    try:
        settings = model.model_validate(document.data)
    except ValidationError as error:
        found = explain(error, document.data, model)
        raise document.error([*document.findings, *found]) from None
    if document.findings:
        raise document.error(document.findings)
    return settings


_NO_RECIPE = "it is empty: a recipe has at least 'version: 1' and 'stages:' with one stage"
_NO_MAPPING = (
    "a recipe is a mapping with 'version', 'quality', 'calibration', 'stages' and 'exports'"
)


def _without_echoes(own: list[Finding], found: list[Finding]) -> list[Finding]:
    """All findings, each once; nothing more about an entry that could not even be read."""
    unread = {finding.location for finding in own}
    return list(dict.fromkeys([*own, *(f for f in found if f.location not in unread)]))


def _partial_misfits(data: Mapping[str, Any], base: Path) -> list[Finding]:
    """What does not fit between the parts, as far as the valid parts of the data tell."""
    stages, exports = data.get("stages"), data.get("exports")
    if not isinstance(stages, (list, tuple)):
        return []
    return misfits(
        [_part(_STAGE, ("stages", i), data, base) for i in range(len(stages))],
        [_part(_EXPORT, ("exports", i), data, base) for i in range(len(exports))]
        if isinstance(exports, (list, tuple))
        else [],
        calibrated=data.get("calibration") is not None,
    )


_STAGE: TypeAdapter[Modifier] = TypeAdapter(Stage)
_EXPORT: TypeAdapter[Exporter] = TypeAdapter(Export)


def _part(
    adapter: TypeAdapter[Any], location: Location, data: Mapping[str, Any], base: Path
) -> Any:
    """The stage or exporter; its class if its settings are wrong; ``None`` if it is unknown."""
    group, index = location
    try:
        return adapter.validate_python(data[str(group)][index], context={BASE: base})
    except ValidationError:
        return settings_class(location, data)
