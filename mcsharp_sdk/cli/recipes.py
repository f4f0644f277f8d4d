"""mcsharp recipes: the recipes that come with the package."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mcsharp_sdk.cli.options import JsonOption, new_path
from mcsharp_sdk.cli.output import print_json, print_table, print_text
from mcsharp_sdk.errors import InputError

recipes = typer.Typer(
    help="List, show and copy the recipes that come with mcsharp.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A name that `ls` shows.")]


@recipes.command("ls")
def list_recipes(json: JsonOption = False) -> None:
    """List the recipes, each with what it is for."""
    from mcsharp_sdk.recipe.library import packaged

    purposes = {name: _purpose(text) for name, text in packaged().items()}
    if json:
        print_json([{"name": name, "purpose": purpose} for name, purpose in purposes.items()])
    else:
        print_table("", ["name", "purpose"], list(purposes.items()))


def _purpose(text: str) -> str:
    """The first line of the comment that a recipe begins with."""
    first = text.split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


@recipes.command("show")
def show_recipe(name: NameArgument) -> None:
    """Print a recipe."""
    from mcsharp_sdk.recipe.library import packaged_text

    sys.stdout.write(packaged_text(name))


@recipes.command("cp")
def copy_recipe(
    name: NameArgument,
    destination: Annotated[
        Path,
        typer.Argument(
            metavar="DEST", parser=new_path, help="A new file, or a folder to put it in."
        ),
    ],
) -> None:
    """Copy a recipe to edit it; a file that is there already stays as it is."""
    from mcsharp_sdk.artifact_file import atomic_file
    from mcsharp_sdk.recipe.library import packaged_text

    text = packaged_text(name)
    if destination.is_dir():
        destination = destination / f"{name.removesuffix('.yaml')}.yaml"
    if os.path.lexists(destination):
        raise InputError(f"'{destination}' is there already: give another name")
    try:
        with atomic_file(destination) as file:
            file.write(text.encode())
    except OSError as error:
        why = error.strerror
        raise InputError(f"'{destination}' cannot be written: {why}; give another DEST") from None
    print_text(f"wrote {destination}")
