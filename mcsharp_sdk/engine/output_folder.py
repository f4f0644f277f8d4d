"""Whether a folder may be made, or replaced, as the output of a run."""

from __future__ import annotations

import os
from pathlib import Path

from mcsharp_sdk.errors import InputError

RESULT_FILES = ("mcsharp_report.json", "onnx_routers/manifest.json", "onnx_model/manifest.json")
"""A folder with one of these was written by an exporter, and may be overwritten."""


def check_output(output: Path, model: Path, run_directory: Path, overwrite: bool) -> None:
    """InputError if a folder cannot become the output, or holds what is not ours to replace."""
    if output.is_file():
        raise InputError(f"{output} is a file; the output must be a folder to make")
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists already; give --overwrite to replace it")
    if _lies_in(model, output):
        raise InputError(
            f"the model {model} lies in the output {output}, which would be replaced: give another "
            "--output"
        )
    if output.exists() and any(output.iterdir()) and not _is_ours(output):
        raise InputError(
            f"{output} holds something else than a result of mcsharp, so it is not overwritten; "
            "give another --output, or empty the folder yourself"
        )
    if _lies_in(run_directory, output):
        raise InputError(f"the run directory {run_directory} must not lie in the output {output}")
    check_writable(output)


def check_writable(folder: Path) -> None:
    """InputError if a folder cannot be made."""
    parent = folder.absolute().parent
    existing = next(p for p in (parent, *parent.parents) if p.exists())
    if not os.access(existing, os.W_OK):
        raise InputError(f"{folder} cannot be made: {existing} is not writable")


def _lies_in(path: Path, folder: Path) -> bool:
    return folder.resolve() in (path.resolve(), *path.resolve().parents)


def _is_ours(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RESULT_FILES)
