"""Bring a finished result to its place: a kill at any moment leaves the old one or the new."""

from __future__ import annotations

from pathlib import Path

from mcsharp_sdk.checked_files import (
    CHECKSUMS_FILE,
    DamagedFile,
    file_hash,
    hash_of,
    read_checked_json,
    write_checksums,
)
from mcsharp_sdk.engine.output_folder import check_replaceable
from mcsharp_sdk.engine.run_directory import PUBLISHED_FILE, RunDirectory
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.partial_folder import put_in_place
from mcsharp_sdk.recipe.schema import Recipe


def is_published(run_directory: Path, output: Path, recipe: Recipe) -> bool:
    """Whether the run in a directory has brought this recipe's result to its place already.

    So it is if a run was killed between that and the removal of its run directory.
    """
    record, sums = run_directory / PUBLISHED_FILE, output / CHECKSUMS_FILE
    if not record.is_file() or not sums.is_file():
        return False
    try:
        return bool(read_checked_json(record) == _identity(output, recipe, sums))
    except DamagedFile:
        return False


def _identity(output: Path, recipe: Recipe, sums: Path) -> dict[str, str]:
    return {
        "output": str(output.resolve()),
        "recipe": hash_of(recipe.as_run),
        "checksums": file_hash(sums),
    }


def publish(
    partial: Path, output: Path, recipe: Recipe, directory: RunDirectory, *, overwrite: bool
) -> None:
    """Give a folder in which everything is written its checksums, and rename it to ``output``.

    Raises
    ------
    InputError
        If ``output`` came into being, or files of others came into it, since the run began.
    """
    write_checksums(partial)
    directory.mark_published(_identity(output, recipe, partial / CHECKSUMS_FILE))
    if output.exists():
        if not overwrite:
            raise InputError(f"{output} came into being meanwhile; give --overwrite to replace it")
        check_replaceable(output)
    put_in_place(partial, output)
