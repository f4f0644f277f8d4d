"""mcsharp export: write down what a model folder holds in another form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from mcsharp_sdk.cli.options import JsonOption, new_path, path
from mcsharp_sdk.cli.output import print_json, print_text
from mcsharp_sdk.folders import check_model_folder


def export(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="onnx_model or onnx_routers")],
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", parser=path, help="Model folder, compressed or not."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            parser=new_path,
            help="Folder to make. Default: DIR/KIND.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of onnx_routers: fp32 (the default), fp16 or bf16; as --set dtype=."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SETTING=VALUE",
            help="A setting of the exporter, e.g. pruning=rule; may be repeated.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier export wrote there.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Export from a model folder: onnx_model the whole model, onnx_routers one graph per router."""
    from mcsharp_sdk.engine.export import export as run

    check_model_folder(directory)
    settings = _settings([*(overrides or ()), *([f"dtype={dtype}"] if dtype else ())])
    manifest = run(kind, directory, output, overwrite=overwrite, **settings)
    if json:
        print_json(manifest)
    else:
        target = directory / kind if output is None else output
        print_text(f"{_summary(manifest)} {target}")


def _summary(manifest: Mapping[str, Any]) -> str:
    """What lies in the folder that is named next."""
    if isinstance(manifest["layers"], list):
        return f"{len(manifest['layers'])} graphs are in"
    size = decimal(sum(entry["bytes"] for entry in manifest["files"]))
    bits = f"{manifest['nominal_bits']:.3f} nominal, {manifest['stored_bits']:.3f} stored bits"
    return f"{manifest['layers']} layers, {size}, {bits}, pruning '{manifest['pruning']}', are in"


def _settings(overrides: list[str]) -> dict[str, Any]:
    """Setting -> value; InputProblems names every override that cannot be read."""
    from mcsharp_sdk.recipe.document import Document
    from mcsharp_sdk.recipe.overrides import apply_overrides

    document = Document("", "mcsharp export", data={})
    apply_overrides(document, overrides)
    if document.findings:
        raise document.error(document.findings)
    return dict(document.data)
