"""Recipes: what to compress with, checked in full before any work.

``Recipe`` is imported on first use: the settings classes that it is made of import
:mod:`mcsharp_sdk.recipe.paths` themselves.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcsharp_sdk.recipe.json_schema import json_schema
    from mcsharp_sdk.recipe.library import open_recipe
    from mcsharp_sdk.recipe.schema import Recipe

__all__ = ["Recipe", "json_schema", "open_recipe"]

_HOMES = {"Recipe": "schema", "json_schema": "json_schema", "open_recipe": "library"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
