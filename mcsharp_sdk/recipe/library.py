"""The recipes that come with the package, by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from mcsharp_sdk.arguments import AnyPath, path_argument, shown
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.recipe.document import suggestion
from mcsharp_sdk.recipe.overrides import Overrides
from mcsharp_sdk.recipe.schema import Recipe

RecipeLike = AnyPath | Mapping[str, Any]
"""A recipe file, the name of one that comes with the package, or a recipe's plain data."""

_SUFFIX = ".yaml"


def packaged() -> dict[str, str]:
    """Name -> YAML text of each recipe of the package, sorted by name."""
    entries = [e for e in files("mcsharp_recipes").iterdir() if e.name.endswith(_SUFFIX)]
    named = {entry.name.removesuffix(_SUFFIX): entry for entry in entries}
    return {name: named[name].read_text(encoding="utf-8") for name in sorted(named)}


def packaged_text(name: str) -> str:
    """The text of a recipe of the package.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    recipes = packaged()
    found = recipes.get(name.removesuffix(_SUFFIX))
    if found is None:
        near = suggestion(name, recipes, otherwise="there are ")
        raise InputError(f"no recipe '{name}' comes with the package{near}")
    return found


def recipe_path(reference: object) -> Path:
    """A recipe's file or name as a path; InputError if it is neither, or a recipe's text."""
    if "\n" in str(reference):
        raise InputError(
            "a recipe's file or name has one line: Recipe.from_text makes a recipe of YAML text"
        )
    return path_argument(reference, "recipe", "a recipe file, or a recipe's name")


def open_recipe(
    reference: AnyPath,
    overrides: Overrides = (),
    environ: Mapping[str, str] = os.environ,
) -> Recipe:
    """The recipe in a file or, where there is no such file, the package's recipe of that name.

    File names in a recipe of the package are relative to the current folder.

    Raises
    ------
    InputProblems, InputError
        If there is neither, or the recipe is wrong.
    """
    path = recipe_path(reference)
    name = path.name.removesuffix(_SUFFIX)
    if os.path.dirname(reference) or path.is_file():
        return Recipe.from_file(path, overrides, environ)
    recipes = packaged()
    if name in recipes:
        return Recipe.from_text(
            recipes[name], f"{name}{_SUFFIX}", overrides=overrides, environ=environ
        )
    if path.suffix or path.exists():
        return Recipe.from_file(path, overrides, environ)
    near = suggestion(name, recipes, otherwise="the package has ")
    raise InputError(f"there is no recipe file '{path}' here{near}")


def as_recipe(recipe: Recipe | RecipeLike, overrides: Overrides = ()) -> Recipe:
    """The recipe itself, or that of a file, a name or plain data.

    Raises
    ------
    InputProblems, InputError
        If the recipe is wrong, it is none of these, or overrides are given for a ``Recipe``.
    """
    if isinstance(recipe, Recipe):
        if overrides:
            raise InputError(
                "overrides go with a recipe file, name or plain data, no Recipe: give its "
                "settings(), or leave them out"
            )
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.from_dict(recipe, overrides=overrides)
    if isinstance(recipe, (str, os.PathLike)):
        return open_recipe(recipe, overrides)
    raise InputError(
        "a recipe is a Recipe, a file, the name of one that comes with the package, or a mapping, "
        f"not {shown(recipe)}"
    )
