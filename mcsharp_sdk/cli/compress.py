"""mcsharp compress: run a recipe on a model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcsharp_sdk.cli.options import (
    JsonOption,
    MaxMemoryOption,
    ModelOption,
    RecipeArgument,
    SetOption,
)
from mcsharp_sdk.cli.output import print_json, print_note, print_table
from mcsharp_sdk.errors import InputError

if TYPE_CHECKING:
    from mcsharp_sdk.engine.run import Compression


def compress(
    recipe: RecipeArgument,
    model: ModelOption,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder to write the result to.")
    ],
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            metavar="DIR",
            help="Keep intermediate results here. Default: beside the output, until it is done.",
        ),
    ] = None,
    overrides: SetOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output folder that is there.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 …")] = "cpu",
    max_memory: MaxMemoryOption = None,
    log_file: Annotated[
        Path | None, typer.Option("--log-file", metavar="FILE", help="Also write a log here.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compress a model as a recipe says. Cut off, the same command continues where it was."""
    from mcsharp_sdk.cli.plan import show_plan
    from mcsharp_sdk.engine.ranks import is_first
    from mcsharp_sdk.engine.run import compress as run

    _log_to(log_file)
    try:
        result = run(
            recipe,
            model,
            output,
            run_dir=run_dir,
            overrides=overrides or [],
            overwrite=overwrite,
            device=device,
            max_memory=max_memory,
            on_plan=None if json else show_plan,
        )
    except KeyboardInterrupt:
        print_note("What is finished is kept: the same command continues from there.")
        raise
    if not is_first():
        return
    if json:
        print_json(result.to_json())
    else:
        _show(result)


def _log_to(file: Path | None) -> None:
    """Send the package's log to a file; on the terminal only the summary names warnings."""
    logger = logging.getLogger("mcsharp_sdk")
    logger.propagate = False
    if file is None:
        logger.addHandler(logging.NullHandler())
        return
    try:
        handler = logging.FileHandler(file, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file}: no log can be written: {error.strerror or error}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _show(result: Compression) -> None:
    from rich.filesize import decimal

    from mcsharp_sdk.evaluation.cost import model_cost
    from mcsharp_sdk.report.page import PAGE_FILE

    for warning in result.warnings:
        print_note(f"warning: {warning}")
    rows = [(stage, f"{seconds:.1f} s") for stage, seconds in result.seconds.items()]
    rows.append(("weights before", decimal(result.plan.bytes_before)))
    if (result.output / "config.json").is_file():
        cost = model_cost(result.output)
        rows += [
            ("weights after", decimal(cost.weight_bytes)),
            ("nominal bits", f"{cost.bits.nominal:.3f}"),
            ("stored bits", f"{cost.bits.stored:.3f}"),
        ]
    planned = decimal(result.plan.peak_memory)
    rows += [
        ("peak memory", f"{decimal(result.peak_memory)}, planned {planned}"),
        ("written to", str(result.output)),
    ]
    if (result.output / PAGE_FILE).is_file():
        rows.append(("report", str(result.output / PAGE_FILE)))
    print_table("Done", ["", ""], rows)
