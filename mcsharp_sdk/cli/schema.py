"""mcsharp schema: the JSON Schema of recipes."""

from __future__ import annotations

from mcsharp_sdk.cli.output import print_json


def schema() -> None:
    """Print the JSON Schema of recipes: point your editor at it for completion and checks."""
    from mcsharp_sdk.recipe import json_schema

    print_json(json_schema())
