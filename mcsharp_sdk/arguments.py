"""Checks of what functions are given that annotations alone do not refuse."""

from __future__ import annotations

import os
from operator import index

from mcsharp_sdk.errors import InputError


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
