"""A stage's result as a file: atomic to write, readable by a person, and clear when it is wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from mcsharp_sdk.arguments import AnyPath, path_argument, path_to_make
from mcsharp_sdk.errors import InputError

FloatArray = NDArray[np.float64]
LARGEST_FLOAT = sys.float_info.max

WRITING_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that come of writing alone."""

TEMPORARY_FILES = ".*.tmp"
"""Names of files that are not finished yet."""
VERSION = 1


class Artifact(ABC):
    """The result of a stage, kept as one file of the run directory."""

    NAME: ClassVar[str]
    FILE: ClassVar[str]

    def save(self, path: AnyPath) -> None:
        """Write the artifact to ``path`` as JSON: to a temporary file first, then renamed.

        Raises
        ------
        InputError
            If ``path`` is none, or a folder.
        """
        file = path_to_make(path, "path", "the file to write")
        if file.is_dir():
            raise InputError(f"{file} is a folder: give the file to write, e.g. {file / self.FILE}")
        write_json(file, self.to_json())

    @classmethod
    def load(cls, path: AnyPath) -> Self:
        """Read the artifact from ``path``.

        Raises
        ------
        InputError
            If the file cannot be read or what it says is not valid; the message names the file.
        """
        file = path_argument(path, "path", "the file to read")
        try:
            return cls.from_json(read_json_object(file))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Content as JSON values."""

    @classmethod
    @abstractmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Build the artifact from JSON values; InputError says what is wrong with them."""


def readable_json(value: Any, indent: str = "") -> str:
    """JSON with one line per object or list of plain values, so that tables look like tables."""
    is_object = isinstance(value, dict)
    children = list(value.values()) if is_object else value if isinstance(value, list) else []
    if not any(isinstance(child, dict | list) for child in children):
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    deeper = indent + "  "
    names = [f"{json.dumps(name)}: " for name in value] if is_object else [""] * len(children)
    lines = [
        f"{deeper}{name}{readable_json(child, deeper)}"
        for name, child in zip(names, children, strict=True)
    ]
    opening, closing = "{}" if is_object else "[]"
    return "\n".join([opening, ",\n".join(lines), indent + closing])


def write_json(path: Path, value: Any) -> None:
    """Write JSON that a person can read, atomically."""
    write_text_atomically(path, readable_json(value) + "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path``: whoever looks sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` when it is whole and on disk.

    Until then it is a hidden file beside it, which an error removes. Each thread has its own.

    Parameters
    ----------
    path : its folder exists.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an error of writing, which knows no file, the name of what is being written."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in WRITING_ERRORS:
            error.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut, where the system can."""
    with contextlib.suppress(OSError):  # some systems cannot open or sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json_file(path: Path) -> dict[str, Any]:
    """As :func:`read_json_object`; the error names the file."""
    try:
        return read_json_object(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises
    ------
    InputError
        If it cannot be read or holds anything else; the caller names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_twins)
    except FileNotFoundError:
        raise InputError("there is no such file") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError("must hold one JSON object")
    return content


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that stands there twice is an error, not a silent loss."""
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"the key {twice!r} stands twice in one object")
    return content


def check_version(content: Mapping[str, Any]) -> None:
    if content.get("version", VERSION) != VERSION:
        raise InputError(f"version {content['version']!r} is not known; this is version {VERSION}")


def index(value: Any, what: str) -> int:
    """A whole number of zero or more; JSON keys are strings, so '7' counts too."""
    if isinstance(value, str) and re.fullmatch(r"0|[1-9][0-9]{0,9}", value):
        value = int(value)
    if type(value) is not int or value < 0:
        raise InputError(f"{what}: {value!r} must be a whole number of zero or more")
    return value


def optional_index(content: Mapping[str, Any], name: str) -> int | None:
    return None if content.get(name) is None else index(content[name], name)


def finite_number(
    what: str, value: Any, least: float = -LARGEST_FLOAT, most: float = LARGEST_FLOAT
) -> float:
    """A number, and not below ``least`` or above ``most``."""
    # By type, since true is a number to Python; compared as it is, since float(10**400) raises.
    if type(value) in (int, float) and least <= value <= most:
        return float(value)
    wanted = f"a number from {least:g} to {most:g}"
    if most == LARGEST_FLOAT:
        wanted = "a finite number" + (f", {least:g} or more" if least > -LARGEST_FLOAT else "")
    raise InputError(f"{what}: {value!r} must be {wanted}")


def numbers(what: str, values: Any) -> FloatArray:
    if not isinstance(values, list):
        raise InputError(f"{what} must be a list of numbers")
    for expert, value in enumerate(values):
        if type(value) not in (int, float):
            raise InputError(f"{what}: expert {expert}: {value!r} is not a number")
    try:
        return np.array(values, dtype=np.float64)
    except OverflowError:
        raise InputError(f"{what}: a number is too large") from None


def per_expert(what: str, values: Any, experts: int) -> FloatArray:
    """(experts,) finite values of zero or more, read-only."""
    array = np.array(values, dtype=np.float64)
    if array.shape != (experts,):
        found = array.shape[0] if array.ndim == 1 else f"shape {array.shape}"
        raise InputError(f"{what}: {found} values for {experts} experts")
    wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    if wrong.size:
        expert = int(wrong[0])
        raise InputError(
            f"{what}: expert {expert}: {array[expert]} must be finite and not negative"
        )
    array.setflags(write=False)
    return array


def listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))
