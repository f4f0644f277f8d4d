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
        help="Text, JSON lines or parquet to predict. Default: text that Python carries.",
    ),
]
WindowOption = Annotated[
    int | None, typer.Option(help="Tokens per window. Default: 2048, or all positions if fewer.")
]
MaxTokensOption = Annotated[
    int | None, typer.Option(help="Use only so many tokens from the start of the text.")
]
