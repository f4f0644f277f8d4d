"""Amounts of memory as people write them, and whether a run keeps to one."""

from __future__ import annotations

import re

from mcsharp_sdk.errors import InputError

UNITS = {
    "": 1,
    **{f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**n for n, letter in enumerate("KMGT", 1)},
}
"""Unit -> bytes."""

_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def read_bytes_of(amount: str | int | None) -> int | None:
    """Bytes of an amount such as ``8GB``, ``7.5 GiB`` or ``8000000000``; None for None.

    Raises
    ------
    InputError
        If it cannot be read, or is nothing.
    """
    if amount is None:
        return None
    found = _AMOUNT.fullmatch(str(amount))
    units = {name.lower(): size for name, size in UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise InputError(f"{amount!r} is no amount of memory: write it like 8GB, 7.5GiB or 800MB")
    size = int(float(found[1]) * units[found[2].lower()])
    if not size:
        raise InputError(f"{amount!r} is no memory at all: write it like 8GB or 800MB")
    return size


def must_spill(allowed: int | None, needed: int, least: int) -> bool:
    """Whether activations must lie on disk for a run to keep to ``allowed`` bytes of memory.

    Parameters
    ----------
    needed, least : what the run takes with activations in memory and on disk, in bytes.

    Raises
    ------
    InputError
        If it cannot keep to it even so; says the least that would do.
    """
    if allowed is None or allowed >= needed:
        return False
    if allowed < least:
        raise InputError(
            f"{_shown(allowed)} of memory are not enough: this recipe on this model takes about "
            f"{_shown(least)} with activations on disk, and {_shown(needed)} with all in memory. "
            f"Give max_memory {_rounded_up(least)} or more"
        )
    return True


def _shown(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _rounded_up(size: int) -> str:
    """The next hundred megabytes."""
    return f"{-(-size // 10**8) / 10:.1f}GB"
