"""Bring a finished result to its place: a kill at any moment leaves the old one or the new."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcsharp_sdk.artifact_file import sync_folder
from mcsharp_sdk.checked_files import (
    CHECKSUMS_FILE,
    DamagedFile,
    file_hash,
    hash_of,
    read_checked_json,
    write_checksums,
)
from mcsharp_sdk.engine.file_lock import lock
from mcsharp_sdk.engine.output_folder import check_replaceable
from mcsharp_sdk.engine.run_directory import PUBLISHED_FILE, RunDirectory
from mcsharp_sdk.errors import InputError
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


@contextmanager
def partial_output(output: Path) -> Iterator[Path]:
    """An empty hidden folder beside ``output`` to write into; it is gone afterwards.

    Raises
    ------
    InputError
        If another run is writing the same output.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    lock_file = output.with_name(f".{output.name}.lock")
    with lock(lock_file, output):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock_file.unlink(missing_ok=True)


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
    old = output.with_name(f".{output.name}.old")
    if output.exists():
        if not overwrite:
            raise InputError(f"{output} came into being meanwhile; give --overwrite to replace it")
        check_replaceable(output)
        shutil.rmtree(old, ignore_errors=True)  # left by a run that was killed while it replaced
        output.rename(old)
    partial.rename(output)
    sync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)
