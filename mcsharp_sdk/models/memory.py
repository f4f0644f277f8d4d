"""Giving memory back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def release_free_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    Tensors of some megabytes come from the C library's heap, which keeps what is freed and
    fragments: without this, resident memory grows by half a gigabyte over the experts of a layer.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
