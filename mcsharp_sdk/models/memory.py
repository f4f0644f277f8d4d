"""Keeping resident memory near what tensors really take, without asking for it anew all the time.

The C library keeps freed memory in its heap, where blocks of some megabytes fragment it: without
this, resident memory grows by half a gigabyte over the experts of a layer. Both functions do
nothing where the C library is not glibc.
"""

from __future__ import annotations

import ctypes
import resource
from functools import cache
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's names (malloc.h) of what may lie free at the heap's end, and of the size from which
memory comes from the system by itself."""

LARGE_BLOCK = 32 * 2**20
FREE_AT_THE_END = 64 * 2**20


@cache
def keep_large_blocks_out_of_the_heap() -> None:
    """Take blocks of ``LARGE_BLOCK`` bytes and more from the system, and give them back when freed.

    Smaller ones are used again, their pages with them, until :func:`release_free_memory`: what one
    product of an expert takes and gives back is filled with zeros by the system otherwise, every
    time. By default glibc raises the first bound as it sees large blocks freed, and leaves 128 KiB
    at the heap's end.
    """
    library = _c_library()
    if library is not None:
        library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        library.mallopt(M_TRIM_THRESHOLD, FREE_AT_THE_END)


def release_free_memory() -> None:
    """Give what is free in the heap back to the system."""
    library = _c_library()
    if library is not None:
        library.malloc_trim(0)


def resident_bytes() -> int:
    """Memory of this process now."""
    return _status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most memory that this process has had; parents do not count where the system tells."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    """A figure of Linux's account of this process, in bytes; 0 where there is none."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    found = next((line for line in lines if line.startswith(f"{name}:")), None)
    return int(found.split()[1]) * 1024 if found else 0


@cache
def _c_library() -> Any:
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
