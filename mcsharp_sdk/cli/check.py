"""mcsharp check: is the recipe right, and does it fit the model?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcsharp_sdk.cli.options import JsonOption, RecipeArgument, SetOption, path
from mcsharp_sdk.cli.output import print_json, print_table, print_text
from mcsharp_sdk.errors import InputError, InputProblems
from mcsharp_sdk.folders import check_model_folder

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mcsharp_sdk.recipe import Recipe


def check(
    recipe: RecipeArgument,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", metavar="DIR", parser=path, help="Also check that it fits this model."
        ),
    ] = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Check a recipe, and whether it fits a model; nothing is computed or written."""
    try:
        checked = _checked(recipe, model, overrides or [])
    except InputError as error:
        if json:
            print_json({"valid": False, "problems": _problems(error)})
        raise
    if json:
        print_json({"valid": True, "problems": [], "recipe": checked.settings()})
    else:
        _show(checked, model)


def _checked(reference: str, model: Path | None, overrides: list[str]) -> Recipe:
    from mcsharp_sdk.recipe import open_recipe

    if model is not None:
        check_model_folder(model)
    recipe = open_recipe(reference, overrides)
    if model is not None:
        from mcsharp_sdk.engine.model_fit import check_model

        check_model(recipe, model)
    return recipe


def _problems(error: InputError) -> list[dict[str, str]]:
    if isinstance(error, InputProblems):
        return [{"where": problem.where, "message": problem.message} for problem in error.told]
    return [{"where": "", "message": str(error)}]


def _show(recipe: Recipe, model: Path | None) -> None:
    from mcsharp_sdk.recipe.document import path_text

    parts: list[tuple[str, Any]] = [
        (path_text(recipe.source_location(index)), source)
        for index, source in enumerate(recipe.sources)
    ]
    parts += [(f"stages[{index}]", stage) for index, stage in enumerate(recipe.stages)]
    parts += [(f"exports[{index}]", exporter) for index, exporter in enumerate(recipe.exports)]
    rows = [(where, _kind(part), _settings(part)) for where, part in parts]
    print_table(recipe.name, ["part", "type", "settings"], rows)
    fits = f" and fits {model}" if model else ""
    print_text(f"The recipe is right{fits}.")


def _kind(part: BaseModel) -> str:
    return str(getattr(part, "type", None) or getattr(part, "source", ""))


def _settings(part: BaseModel) -> str:
    """What the recipe or its mode sets, as ``name=value``; defaults are left out."""
    given = part.model_dump(mode="json", exclude_unset=True, exclude={"type", "source"})
    return ", ".join(f"{name}={value}" for name, value in given.items())
