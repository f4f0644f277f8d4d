"""mcsharp compress: run a recipe on a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from mcsharp_sdk.cli.log_file import keep_off_the_terminal, log_to
from mcsharp_sdk.cli.options import (
    JsonOption,
    MaxMemoryOption,
    ModelOption,
    RecipeArgument,
    ResultOption,
    SetOption,
    new_path,
)
from mcsharp_sdk.cli.output import print_json, print_note, print_table
from mcsharp_sdk.folders import CONFIG_FILE, PAGE_FILE, check_model_folder

if TYPE_CHECKING:
    from mcsharp_sdk.engine.run import Compression
    from mcsharp_sdk.recipe import Recipe


def compress(
    recipe: RecipeArgument,
    model: ModelOption,
    output: ResultOption,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            metavar="DIR",
            parser=new_path,
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
        Path | None,
        typer.Option("--log-file", metavar="FILE", parser=new_path, help="Also write a log here."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compress a model as a recipe says. Cut off, the same command continues where it was."""
    from mcsharp_sdk.engine.output_folder import check_output, default_run_directory
    from mcsharp_sdk.recipe import open_recipe

    keep_off_the_terminal()
    check_model_folder(model)
    opened = open_recipe(recipe, overrides or [])
    output = output.absolute()
    directory = run_dir or default_run_directory(output, opened)
    if log_file is not None:
        log_to(log_file, model, recipe, output, directory)
    if opened.exports and not directory.exists():  # else a run may have made the output already
        check_output(output, model, directory, overwrite)

    from mcsharp_sdk.cli.plan import show_plan
    from mcsharp_sdk.engine.ranks import is_first
    from mcsharp_sdk.engine.run import compress as run

    result = None
    try:
        result = run(
            opened,
            model,
            output,
            run_dir=run_dir,
            overwrite=overwrite,
            device=device,
            max_memory=max_memory,
            on_plan=None if json else show_plan,
        )
        if is_first():
            _tell(result, json)
    except KeyboardInterrupt:
        finished = result.output if result else None
        print_note(_what_is_left(opened, directory, output, finished))
        raise


def _what_is_left(recipe: Recipe, directory: Path, output: Path, finished: Path | None) -> str:
    """What an interrupted run left, and what to do.

    Parameters
    ----------
    directory : of the run.
    finished : the result, if the run had ended.
    """
    from mcsharp_sdk.engine.publication import is_published

    if finished is not None:
        return f"The result is complete in {finished}."
    if is_published(directory, output, recipe):
        return (
            f"The result is complete in {output}. {directory} is left of the run: the same command "
            "removes it."
        )
    if directory.is_dir():
        return (
            f"What is finished is kept in {directory}: the same command continues from there. "
            "Delete that folder to begin again."
        )
    return "Nothing was finished: the same command begins again."


def _tell(result: Compression, json: bool) -> None:
    if json:
        print_json(result.to_json())
    else:
        _show(result)


def _show(result: Compression) -> None:
    from mcsharp_sdk.evaluation.cost import model_cost

    for warning in result.warnings:
        print_note(f"warning: {warning}")
    rows = [(stage, f"{seconds:.1f} s") for stage, seconds in result.seconds.items()]
    rows.append(("weights before", decimal(result.plan.bytes_before)))
    if (result.output / CONFIG_FILE).is_file():
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
