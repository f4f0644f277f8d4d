"""Files whose damage is noticed: JSON with its own checksum, and folders with ``SHA256SUMS``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mcsharp_sdk.artifact_file import read_json_object, write_json, write_text_atomically
from mcsharp_sdk.errors import InputError, Problem, RunError
from mcsharp_sdk.folders import CARD_FILE, PAGE_FILE

CHECKSUMS_FILE = "SHA256SUMS"
"""In the form of the program sha256sum, which can check it too."""

UNSUMMED_FILES = (CARD_FILE, PAGE_FILE)
"""Files without a checksum: one is there to be edited, the other is written anew after evaluating
the model, from files that have one."""


class DamagedFile(RunError):
    """A file that was written whole is not what it was."""


def hash_of(value: Any) -> str:
    """sha256 of JSON values; the order of an object's keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_checked_json(path: Path, content: Any) -> None:
    """Write JSON values that a person can read, atomically, with their checksum."""
    write_json(path, {"content": content, "sha256": hash_of(content)})


def read_checked_json(path: Path) -> Any:
    """What ``write_checked_json`` wrote.

    Raises
    ------
    DamagedFile
        If the file is anything else.
    """
    try:
        kept = read_json_object(path)
    except InputError as error:
        raise DamagedFile(f"{path} {error}") from None
    if kept.keys() != {"content", "sha256"} or hash_of(kept["content"]) != kept["sha256"]:
        raise DamagedFile(f"{path} is damaged: its content does not have its checksum")
    return kept["content"]


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def synced_hash(path: Path) -> str:
    """sha256 of a file that was just written: its bytes are on disk then, whoever wrote them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return file_hash(path)


def write_checksums(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write ``SHA256SUMS`` of a folder's files, but not of those that are to change.

    The files are on disk before it.

    Parameters
    ----------
    names : of the files, relative to the folder; by default all, in subfolders too.
    """
    if names is None:
        files = (file for file in folder.rglob("*") if file.is_file())
        names = (file.relative_to(folder).as_posix() for file in files)
    chosen = sorted(set(names) - {CHECKSUMS_FILE, *UNSUMMED_FILES})
    lines = [f"{synced_hash(folder / name)}  {name}\n" for name in chosen]
    write_text_atomically(folder / CHECKSUMS_FILE, "".join(lines))


def renew_checksums(folder: Path, part: Path) -> None:
    """Bring a folder's ``SHA256SUMS`` up to date with a folder in it, if it names files of that."""
    prefix = part.resolve().relative_to(folder.resolve()).as_posix() + "/"
    sums = read_checksums(folder)
    if any(name.startswith(prefix) for name in sums):
        there = (
            f"{prefix}{f.relative_to(part).as_posix()}" for f in part.rglob("*") if f.is_file()
        )
        others = (name for name in sums if not name.startswith(prefix))
        write_checksums(folder, [*others, *there])


def read_checksums(folder: Path) -> Mapping[str, str]:
    """File name, relative to the folder -> sha256; empty if the folder has no ``SHA256SUMS``.

    Raises
    ------
    InputError
        If a line is not one of sha256sum, or names a file outside of the folder.
    """
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return {}
    sums = {}
    for number, line in enumerate(path.read_bytes().decode(errors="replace").splitlines(), 1):
        digest, separator, name = line.partition("  ")
        if len(digest) != 64 or not separator or not _is_inside(name):
            raise InputError(f"{path}:{number}: is not a sha256 and the name of a file in there")
        sums[name] = digest
    return sums


def changed_files(folder: Path, sums: Mapping[str, str]) -> list[Problem]:
    """The files of ``sums`` that are gone or do not have their checksum."""
    problems = []
    for name, digest in sums.items():
        if name in UNSUMMED_FILES:  # older versions gave the report one
            continue
        file = folder / name
        if not file.is_file():
            problems.append(Problem(name, f"missing, but {CHECKSUMS_FILE} names it"))
        elif file_hash(file) != digest:
            problems.append(Problem(name, f"changed since it was written: see {CHECKSUMS_FILE}"))
    return problems


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return bool(name) and not name.startswith("/") and ".." not in parts and "\0" not in name
