"""The JSON Schema says what the recipe says."""

from __future__ import annotations

from typing import Any

from mcsharp_sdk.recipe import json_schema
from mcsharp_sdk.recipe.schema import Recipe


def test_the_schema_names_all_stages_exporters_and_sources() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    definitions = schema["$defs"]
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    kinds = {
        group: {_kind(definitions, option, key) for option in definitions[group]["oneOf"]}
        for group, key in (("stage", "type"), ("exporter", "type"), ("calibration", "source"))
    }
    assert {"ExpertStats", "BitAllocation", "GPTQQuantize", "Measure", "Decide"} <= kinds["stage"]
    assert {"safetensors", "onnx_routers", "listing"} <= kinds["exporter"]
    assert {"text", "dataset", "embedded"} <= kinds["calibration"]
    assert "Broken" in schema["$comment"]


def _kind(definitions: dict[str, Any], option: dict[str, str], key: str) -> str:
    definition = definitions[option["$ref"].removeprefix("#/$defs/")]
    assert key in definition["required"]
    assert definition["additionalProperties"] is False
    return definition["properties"][key]["const"]


def test_every_reference_in_the_schema_leads_somewhere() -> None:
    schema = json_schema()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                assert node["$ref"].removeprefix("#/$defs/") in schema["$defs"]
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(schema)
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["version", "stages"]
    assert all("description" in shape for shape in schema["properties"].values())
