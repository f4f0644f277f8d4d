"""The JSON Schema of recipes (draft 2020-12), for editors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mcsharp_sdk.recipe.elements import calibration_kinds
from mcsharp_sdk.recipe.quality import Quality
from mcsharp_sdk.recipe.registry import EXPORTERS, MODIFIERS
from mcsharp_sdk.recipe.schema import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """A schema that accepts what a recipe may hold, with all stages and exporters installed here.

    Plug-ins that cannot be imported are left out and named in ``$comment``.
    """
    stages, exports = dict(MODIFIERS.usable()), dict(EXPORTERS.usable())
    groups: dict[str, tuple[str, Mapping[str, type[BaseModel] | None]]] = {
        "calibration": ("source", calibration_kinds()),
        "stage": ("type", stages),
        "exporter": ("type", exports),
    }
    definitions: dict[str, Any] = {}
    for group, (key, kinds) in groups.items():
        definitions |= _definitions(group, key, {n: k for n, k in kinds.items() if k is not None})
    schema: dict[str, Any] = {
        "$schema": DIALECT,
        "title": "mcsharp recipe",
        "description": (Recipe.__doc__ or "").strip().split("\n")[0],
        "type": "object",
        "properties": _properties(),
        "required": ["version", "stages"],
        "additionalProperties": False,
        "$defs": definitions,
    }
    if broken := [name for name, kind in (stages | exports).items() if kind is None]:
        schema["$comment"] = f"left out, since they cannot be imported: {', '.join(broken)}"
    return schema


def _properties() -> dict[str, Any]:
    shapes: dict[str, dict[str, Any]] = {
        "version": {"const": 1},
        "quality": {"enum": list(get_args(Quality)), "default": "balanced"},
        "calibration": {
            "anyOf": [
                _reference("calibration"),
                {"type": "array", "items": _reference("calibration"), "minItems": 1},
                {"type": "null"},
            ]
        },
        "stages": {"type": "array", "items": _reference("stage"), "minItems": 1},
        "exports": {"type": "array", "items": _reference("exporter")},
    }
    return {
        name: {"description": Recipe.model_fields[name].description, **shape}
        for name, shape in shapes.items()
    }


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}


def _definitions(group: str, key: str, kinds: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """Definition of the union of the kinds, told apart by ``key``, and of each of them."""
    references, combined = models_json_schema(
        [(kind, "validation") for kind in kinds.values()], ref_template="#/$defs/{model}"
    )
    definitions: dict[str, Any] = dict(combined.get("$defs", {}))
    for kind in kinds.values():
        name = references[(kind, "validation")]["$ref"].rpartition("/")[2]
        required = definitions[name].get("required", [])
        definitions[name]["required"] = list(dict.fromkeys([key, *required]))
        definitions[name].setdefault("additionalProperties", False)
    union = [references[(kind, "validation")] for kind in kinds.values()]
    definitions[group] = {"oneOf": union}
    return definitions
