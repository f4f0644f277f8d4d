"""Arguments and options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mcsharp_sdk.arguments import path_argument, path_to_make
from mcsharp_sdk.errors import InputError


def path(text: str) -> Path:
    """Parser of a path to what is there; ``Path`` alone takes "" for the current folder."""
    return _checked(path_argument, text)


def new_path(text: str) -> Path:
    """Parser of a path to what will be written."""
    return _checked(path_to_make, text)


def _checked(read: Callable[[str, str], Path], text: str) -> Path:
    try:
        return read(text, "the path")
    except InputError as error:
        raise typer.BadParameter(str(error)) from None


ResultOption = Annotated[
    Path,
    typer.Option("--output", metavar="DIR", parser=new_path, help="Folder to write the result to."),
]

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe file, or the name of one that comes with mcsharp."
    ),
]
ModelOption = Annotated[
    Path,
    typer.Option(
        "--model",
        metavar="DIR",
        parser=path,
        help="Folder of the model in safetensors form.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TARGET=VALUE",
        help="Change a setting, e.g. stages.BitAllocation.target_bits=2.0; may be repeated.",
    ),
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Keep to so much memory, e.g. 8GB; activations go to disk where they must.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
TextOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        parser=path,
        help="Text, JSON lines or parquet to predict. Default: text that Python carries.",
    ),
]
WindowOption = Annotated[
    int | None, typer.Option(help="Tokens per window. Default: 2048, or all positions if fewer.")
]
MaxTokensOption = Annotated[
    int | None, typer.Option(help="Use only so many tokens from the start of the text.")
]
