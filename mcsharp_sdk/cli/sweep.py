"""mcsharp sweep: run variants of a recipe and compare them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from mcsharp_sdk.cli.log_file import keep_off_the_terminal
from mcsharp_sdk.cli.options import (
    JsonOption,
    MaxTokensOption,
    ModelOption,
    RecipeArgument,
    SetOption,
    TextOption,
    WindowOption,
    new_path,
)
from mcsharp_sdk.cli.output import print_json, print_note, print_table, print_text
from mcsharp_sdk.errors import RunError
from mcsharp_sdk.folders import check_model_folder

if TYPE_CHECKING:
    from mcsharp_sdk.engine.sweep import Sweep
    from mcsharp_sdk.engine.sweep_folder import Result


def sweep(
    recipe: RecipeArgument,
    model: ModelOption,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="DIR",
            parser=new_path,
            help="Folder to write the comparison to.",
        ),
    ],
    vary: Annotated[
        list[str],
        typer.Option(
            "--vary",
            metavar="TARGET=VALUE,VALUE",
            help="Values of a setting, e.g. stages.BitAllocation.target_bits=2,2.5; may be "
            "repeated: then all combinations are run.",
        ),
    ],
    overrides: SetOption = None,
    text: TextOption = None,
    window: WindowOption = None,
    max_tokens: MaxTokensOption = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            metavar="DIR",
            parser=new_path,
            help="Keep finished stages here, for other sweeps too. Default: in the output, as long "
            "as they are needed.",
        ),
    ] = None,
    keep_models: Annotated[
        bool,
        typer.Option("--keep-models", help="Keep the compressed models, not only their figures."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the sweep that is in the output folder.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 …")] = "cpu",
    json: JsonOption = False,
) -> None:
    """Run variants of a recipe, sharing what they have in common, and compare them.

    Cut off, the same command continues where it was.
    """
    check_model_folder(model)

    from mcsharp_sdk.engine.sweep import sweep as run

    keep_off_the_terminal()
    result = run(
        recipe,
        model,
        output,
        vary,
        text=text,
        window=window,
        max_tokens=max_tokens,
        overrides=overrides or [],
        run_dir=run_dir,
        keep_models=keep_models,
        overwrite=overwrite,
        device=device,
        on_variant=_tell,
    )
    if json:
        print_json(result.to_json())
    else:
        _show(result)
    _raise_failures(result)


def _tell(name: str, number: int, count: int) -> None:
    print_note(f"variant {number} of {count}: {name}")


def _show(result: Sweep) -> None:
    from mcsharp_sdk.engine.sweep_folder import PLOT_FILE, SWEEP_FILE, TABLE_FILE

    counts = Counter(warning for r in result.results for warning in set(r.warnings))
    for warning in dict.fromkeys(w for r in result.results for w in r.warnings):
        some = f" ({counts[warning]} of {len(result.results)} variants)"
        print_note(f"warning{some if counts[warning] < len(result.results) else ''}: {warning}")
    columns = ["variant", "perplexity", "weights", "stored bits", "activated", "read per token"]
    print_table("Sweep", columns, [_row(r) for r in result.results])
    print_text(f"Table and plot are in {result.output}: {TABLE_FILE}, {SWEEP_FILE}, {PLOT_FILE}")


def _row(result: Result) -> list[Any]:
    if result.error:
        return [result.name, "failed", *[None] * 4]
    found = result.evaluation
    perplexity = found["perplexity"]
    return [
        result.name,
        "infinite" if perplexity is None else f"{perplexity:.4g}",
        decimal(found["bytes"]),
        f"{found['stored_bits']:.3f}",
        f"{found['activated_expert_ratio']:.1%}",
        decimal(round(found["activated_bytes_per_token"])),
    ]


def _raise_failures(result: Sweep) -> None:
    failures = [f"\n  {failed.name}: {failed.error}" for failed in result.failures]
    if failures:
        heading = f"{len(failures)} of {len(result.results)} variants failed"
        again = "\nThe same command tries them again."
        causes = [failed.cause for failed in result.failures if failed.cause is not None]
        told = f"{heading}:{''.join(failures)}{again}"
        raise RunError(told) from (ExceptionGroup(heading, causes) if causes else None)
