"""Write the tables of settings in recipes.md from the settings' own classes.

python docs/generate_settings.py

Everything between the two markers in the page is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.recipe.elements import calibration_kinds
from mcsharp_sdk.recipe.registry import EXPORTERS, MODIFIERS

PAGE = Path(__file__).with_name("recipes.md")
BEGIN = "<!-- settings: written by docs/generate_settings.py -->"
END = "<!-- end of settings -->"

OURS = ("mcsharp_sdk.", "mcsharp_exporters.")
STAGES = (
    *("ExpertStats", "BitAllocation", "GPTQQuantize", "RouterCalibration"),
    *("TokenProtection", "TopAnyRouter"),
)
"""Order of the stages on the page; stages that are not named here follow."""

HEAD = ["| setting | values | default | |", "|---|---|---|---|"]
KINDS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true, false",
    "null": "null",
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def updated(page: str) -> str:
    """The page with its tables made anew; ValueError if a marker is missing."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the page lacks '{BEGIN}' or '{END}'")
    return before + "\n".join([BEGIN, "", *_sections(), ""]) + END + after


def _sections() -> Iterator[str]:
    sources = calibration_kinds()
    common = set.intersection(*(set(kind.model_fields) for kind in sources.values())) - {"source"}
    yield from ["### calibration", "", "All sources:", "", *HEAD]
    first = next(iter(sources.values()))
    yield from _rows(first, only=common)
    for name, kind in sources.items():
        said = {n for n in common if _description(kind, n) == _description(first, n)}
        rows = list(_rows(kind, leave=said | {"source"}))
        yield from [
            "",
            f"`source: {name}`. {_summary(kind)}",
            *(["", *HEAD, *rows] if rows else []),
        ]
    for name, stage in _ours(MODIFIERS.usable()):
        yield from ["", f"### {name}", "", _summary(stage), "", *HEAD]
        yield from _rows(stage, leave={"type"})
        yield from _presets(stage)
    for name, exporter in _ours(EXPORTERS.usable()):
        yield from ["", f"### {name}", "", _summary(exporter), "", *HEAD]
        yield from _rows(exporter, leave={"type"})


def _description(kind: type[BaseModel], setting: str) -> str | None:
    return kind.model_fields[setting].description


def _ours(found: Iterator[tuple[str, type[Any] | None]]) -> list[tuple[str, type[Any]]]:
    """What comes with the package, in the page's order."""
    known = [(n, kind) for n, kind in found if kind and kind.__module__.startswith(OURS)]
    place = {name: index for index, name in enumerate(STAGES)}
    return sorted(known, key=lambda entry: (place.get(entry[0], len(place)), entry[0]))


def _summary(kind: type[BaseModel]) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].replace("``", "`").split())


def _rows(
    kind: type[BaseModel],
    only: Set[str] | None = None,
    leave: Set[str] = frozenset(),
) -> Iterator[str]:
    schema = kind.model_json_schema()
    definitions = schema.get("$defs", {})
    for name, setting in schema["properties"].items():
        if name in leave or (only is not None and name not in only):
            continue
        field = kind.model_fields[name]
        default = "required" if field.is_required() else _default(field)
        cells = [f"`{name}`", _values(setting, definitions), default]
        yield f"| {' | '.join(cells)} | {setting.get('description', '')} |"


def _values(setting: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """The values that a setting takes, in words."""
    if "$ref" in setting:
        return _values(definitions[setting["$ref"].rpartition("/")[2]], definitions)
    for choices in ("anyOf", "oneOf"):
        if choices in setting:
            return ", ".join(_values(option, definitions) for option in setting[choices])
    if "enum" in setting:
        return ", ".join(f"`{choice}`" for choice in setting["enum"])
    if "const" in setting:
        return f"`{setting['const']}`"
    if setting.get("format") == "path":
        return "file"
    if setting["type"] == "array":
        return f"list of: {_values(setting['items'], definitions)}"
    if "properties" in setting:
        named = setting["properties"].items()
        return f"{{{', '.join(f'`{n}`: {_values(v, definitions)}' for n, v in named)}}}"
    if setting["type"] == "object":
        return f"mapping to: {_values(setting['additionalProperties'], definitions)}"
    bounds = [f"{sign} {setting[name]:g}" for name, sign in BOUNDS.items() if name in setting]
    return " ".join([KINDS[setting["type"]], ", ".join(bounds)]).strip()


def _default(field: FieldInfo) -> str:
    return _shown(field.get_default(call_default_factory=True, validated_data={}))


def _shown(default: Any) -> str:
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list | tuple):
        return f"[{', '.join(_shown(value) for value in default)}]"
    if isinstance(default, Mapping):
        return f"{{{', '.join(f'{name}: {_shown(value)}' for name, value in default.items())}}}"
    return str(default)


def _presets(stage: type[Modifier]) -> Iterator[str]:
    """What the modes set, for stages that have modes."""
    if stage.PRESETS:
        yield ""
    for mode, settings in stage.PRESETS.items():
        changed = ", ".join(f"`{name}: {_shown(value)}`" for name, value in settings.items())
        yield f"- `mode: {mode}` sets {changed or 'nothing else'}."


if __name__ == "__main__":
    main()
