"""Checks of what functions are given that annotations alone do not refuse."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from operator import index
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from mcsharp_sdk.errors import InputError

AnyPath = str | os.PathLike[str]

LONGEST_NAME = 255
"""Bytes of a name within a path; file systems take no more."""

LONGEST_NEW_NAME = LONGEST_NAME - 32
"""The same of what is made: until it is finished, its name has more before and behind it."""

LONG_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Short names of dtypes -> the names that torch and numpy have for them."""


def list_argument(values: object, name: str) -> list[Any]:
    """The values, several of them: a single text would be read letter by letter.

    Raises
    ------
    InputError
        If ``values`` is a text, bytes, a path, a mapping or nothing to go through; ``name`` is that
        of the argument.
    """
    if isinstance(values, (str, bytes, os.PathLike)):
        raise InputError(f"{name} is a list: give [{values!r}], not {values!r}")
    if isinstance(values, Mapping) or not isinstance(values, Iterable):
        raise InputError(f"{name} is a list, not {shown(values)}")
    return list(values)


def text_list(values: object, name: str) -> list[str]:
    """The values, all of which are texts; InputError as of :func:`list_argument`."""
    listed = list_argument(values, name)
    for value in listed:
        if not isinstance(value, str):
            raise InputError(f"{name} is a list of texts, and {shown(value)} is none")
    return listed


def path_argument(value: object, name: str, what: str = "a text or a pathlib.Path") -> Path:
    """The path of an argument.

    Parameters
    ----------
    name : of the argument.
    what : to be given, for the message.

    Raises
    ------
    InputError
        If it is none, is empty, which ``Path`` takes for the current folder, or can name nothing.
    """
    given = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(given, str):
        raise InputError(f"{name} is a path, not {shown(value)}: give {what}")
    if not given:
        raise InputError(f"{name} is empty: give a path; '.' is the current folder")
    path = Path(given)
    try:
        longest = max((len(part.encode()) for part in path.parts), default=0)
    except UnicodeEncodeError:  # what Python makes of bytes that are no text
        raise InputError(f"{name} {given!a} is not text in UTF-8: give another name") from None
    if longest > LONGEST_NAME:
        raise InputError(_too_long(name, longest, LONGEST_NAME))
    return path


def path_to_make(value: object, name: str, what: str = "a text or a pathlib.Path") -> Path:
    """As :func:`path_argument`, of something that will be made.

    Raises
    ------
    InputError
        Also if it begins with ``~``, of which a folder of that name would be made.
    """
    path = path_argument(value, name, what)
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


def optional_path(value: object, name: str, what: str = "a text or a pathlib.Path") -> Path | None:
    """As :func:`path_argument`; None for None."""
    return None if value is None else path_argument(value, name, what)


def model_path(value: object, name: str = "model") -> Path:
    """The path of a model; InputError as of :func:`path_argument`."""
    return path_argument(value, name, "the folder of the model")


def whole_number(value: object, name: str) -> int:
    """The value as an ``int``, also from one of numpy.

    Raises
    ------
    InputError
        If it is no whole number, or one with a decimal point, or true or false.
    """
    wrong = InputError(f"{name} is a whole number, not {shown(value)}")
    if isinstance(value, bool):
        raise wrong
    try:
        return index(value)  # type: ignore[arg-type]  # what it is, is asked here
    except TypeError:
        raise wrong from None


def check_truth(**values: object) -> None:
    """Check that arguments, by their names, are True or False: any text but an empty one is true.

    Raises
    ------
    InputError
        If one is neither.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise InputError(f"{name} is True or False, not {shown(value)}")


def dtype_name(dtype: object) -> str:
    """The long name of a dtype that is given as torch has it, or by either name."""
    name = str(dtype).removeprefix("torch.")
    return LONG_DTYPES.get(name, name)


def short_dtype(dtype: object) -> object:
    """The short name of a dtype, where it has one; else what was given."""
    names = {long: short for short, long in LONG_DTYPES.items()}
    return names.get(dtype_name(dtype), dtype)
