"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe file, or the name of one that comes with mcsharp."
    ),
]
ModelOption = Annotated[
    Path, typer.Option("--model", metavar="DIR", help="Folder of the model in safetensors form.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TARGET=VALUE",
        help="Change a setting, e.g. stages.BitAllocation.target_bits=2.0; may be repeated.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
