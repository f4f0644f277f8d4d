"""Checks of what functions are given that annotations alone do not refuse."""

from __future__ import annotations

import os
from operator import index
from pathlib import Path

from mcsharp_sdk.errors import InputError

LONGEST_NAME = 255
"""Bytes of a name within a path; file systems take no more."""

LONGEST_NEW_NAME = LONGEST_NAME - 32
"""The same of what is made: until it is finished, its name has more before and behind it."""


def given_path(value: str | os.PathLike[str], name: str) -> Path:
    """The path that an argument gives.

    Raises
    ------
    InputError
        If it is empty, which ``Path`` takes for the current folder, or can name nothing.
    """
    path, text = Path(value), os.fspath(value)
    if not text:
        raise InputError(f"{name} is empty: give a path; '.' is the current folder")
    try:
        longest = max((len(part.encode()) for part in path.parts), default=0)
    except UnicodeEncodeError:  # what Python makes of bytes that are no text
        raise InputError(f"{name} {text!a} is not text in UTF-8: give another name") from None
    if longest > LONGEST_NAME:
        raise InputError(_too_long(name, longest, LONGEST_NAME))
    return path


def path_to_make(value: str | os.PathLike[str], name: str) -> Path:
    """As :func:`given_path`, of something that will be made.

    Raises
    ------
    InputError
        Also if it begins with ``~``, of which a folder of that name would be made.
    """
    path = given_path(value, name)
    if path.parts[:1] == ("~",):
        raise InputError(f"{name} {path}: ~ is not expanded here: write the path in full")
    length = len(path.name.encode())
    if length > LONGEST_NEW_NAME:
        raise InputError(_too_long(name, length, LONGEST_NEW_NAME))
    return path


def _too_long(name: str, length: int, most: int) -> str:
    return (
        f"{name}: a name in it has {length} bytes, at most {most} are possible: give a shorter one"
    )


def refuse_single(values: object, name: str) -> None:
    """Refuse one text or path where several are expected: a text would be read letter by letter.

    Raises
    ------
    InputError
        If ``values`` is a text, bytes or a path; ``name`` is that of the argument.
    """
    if isinstance(values, (str, bytes, os.PathLike)):
        raise InputError(f"{name} is a list: give [{values!r}], not {values!r}")


def whole_number(value: object, name: str) -> int:
    """The value as an ``int``, also from one of numpy.

    Raises
    ------
    InputError
        If it is no whole number, or one with a decimal point.
    """
    try:
        return index(value)  # type: ignore[arg-type]  # what it is, is asked here
    except TypeError:
        raise InputError(f"{name} is a whole number, not {value!r}") from None
