"""mcsharp export: write down what a model folder holds in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mcsharp_sdk.cli.options import JsonOption
from mcsharp_sdk.cli.output import print_json, print_text


def export(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="onnx_routers")],
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Model folder, compressed or not.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Folder to make. Default: DIR/KIND."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier export wrote there.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Export from a model folder; onnx_routers writes one graph per MoE layer."""
    from mcsharp_sdk.engine.export import export as run

    manifest = run(kind, directory, output, overwrite=overwrite, dtype=dtype)
    if json:
        print_json(manifest)
    else:
        target = directory / kind if output is None else output
        print_text(f"{len(manifest['layers'])} graphs are in {target}")
