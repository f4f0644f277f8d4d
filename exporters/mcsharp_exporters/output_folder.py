"""Folders that exporters make, all or nothing, and what they take over from the model's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mcsharp_sdk.data.tokenise import tokenizer_files
from mcsharp_sdk.engine.partial_folder import partial_folder, put_in_place
from mcsharp_sdk.errors import InputError

GENERATION_CONFIG = "generation_config.json"


def write_file(path: Path, data: bytes) -> None:
    """Make a file, and have it on disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def check_free(output: Path, overwrite: bool, is_ours: Callable[[str], bool], what: str) -> None:
    """Refuse a path that is taken, unless it holds earlier exports only and may be overwritten.

    Parameters
    ----------
    is_ours : tells by a file's name whether such an export wrote it.
    what : what it exports, for the error.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or output.is_symlink():
        raise InputError(f"{output}: is there already and is not a folder")
    names = sorted(path.name for path in output.iterdir())
    if names and not overwrite:
        raise InputError(f"{output}: is there already; give another output, or overwrite it")
    strangers = [name for name in names if not is_ours(name)]
    if strangers:
        raise InputError(
            f"{output}: holds {strangers[0]!r}, which is no {what}; it is not overwritten"
        )


@contextmanager
def folder_in_one_go(output: Path) -> Iterator[Path]:
    """A new folder that takes ``output``'s place when the block ends well, else vanishes.

    Raises
    ------
    InputError
        If another process is writing the same output.
    """
    with partial_folder(output) as fresh:
        yield fresh
        put_in_place(fresh, output)


def copy_files(source: Path, output: Path) -> None:
    """Copy what of a model's folder belongs to one made of it too: tokenizer, chat template, …"""
    generation = source / GENERATION_CONFIG
    for file in [*tokenizer_files(source), *([generation] if generation.is_file() else [])]:
        shutil.copyfile(file, output / file.name)
