"""mcsharp report: pages with pictures of one run, or of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mcsharp_sdk.cli.options import JsonOption, new_path, path
from mcsharp_sdk.cli.output import print_json, print_text
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.folders import PAGE_FILE, check_model_folder


def report(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR…",
            parser=path,
            help="Folder of a compressed model; several to compare.",
        ),
    ],
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Draw quality against cost of all folders; a sweep's may be one."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            parser=new_path,
            help=f"File to write. Default: {PAGE_FILE} in the folder.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write a page that shows what a run did, or compares several; it works offline."""
    if compare:
        written = _compare(directories, output)
    else:
        if len(directories) > 1:
            raise InputError("several folders go on one page with --compare")
        check_model_folder(directories[0])
        from mcsharp_sdk.report.page import write_report

        written = write_report(directories[0], output)
    if json:
        print_json({"output": written})
    else:
        print_text(f"The page is {written}")


def _compare(directories: list[Path], output: Path | None) -> Path:
    from mcsharp_sdk.report.comparison import write_comparison

    if output is None:
        raise InputError("--compare needs --output FILE: the page belongs to none of the folders")
    return write_comparison(directories, output)
