"""Folders that come into being whole: written beside their place, and renamed to it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcsharp_sdk.artifact_file import naming, sync_folder
from mcsharp_sdk.file_lock import lock


@contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """An empty hidden folder beside ``output`` to write into; it is gone afterwards.

    Its name is the same every time, so that what a killed process left is used up by the next one.

    Raises
    ------
    InUse
        If another process is writing the same output.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    lock_file = output.with_name(f".{output.name}.lock")
    with lock(lock_file, output):
        try:
            _remove(partial)
            partial.mkdir()
            with naming(output):
                yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock_file.unlink(missing_ok=True)


def put_in_place(partial: Path, output: Path) -> None:
    """Rename a folder to ``output``; one that is there goes, and is there whole until then."""
    old = output.with_name(f".{output.name}.old")
    if output.exists():
        _remove(old)  # left by a process that was killed in here
        output.rename(old)
    try:
        partial.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    sync_folder(output.parent)
    _remove(old)


def _remove(path: Path) -> None:
    """Delete a folder, or a link or file that stands where one is to be; what can be of it."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
