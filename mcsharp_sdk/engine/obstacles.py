"""What stops work from outside (a full disk, too little memory), told with what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcsharp_sdk.errors import RunError

DISK_ERRORS = {
    errno.ENOSPC: "no space is left on the disk: make room",
    errno.EDQUOT: "the disk quota is used up: make room",
    errno.EFBIG: "a file would be larger than allowed (see `ulimit -f`): raise the limit",
    errno.EROFS: "the file system is read-only: make it writable",
    errno.EACCES: "access is denied: change the permissions, or give another place",
    errno.EIO: "the disk cannot be read or written: check it",
    errno.ENAMETOOLONG: "a file name would be too long: give a shorter output or run directory",
}
"""Error number -> what it means, and what to do."""


def disk_obstacle(error: OSError) -> str | None:
    """What happened to which file and what to do, or None if the disk is not to blame."""
    if error.errno not in DISK_ERRORS:
        return None
    name = error.filename2 or error.filename  # of a copy, the file that is written comes second
    where = f"{name}: " if name else ""
    return f"{where}{DISK_ERRORS[error.errno]}"


@contextmanager
def explained(run_directory: Path) -> Iterator[None]:
    """Raise what stops work from outside as RunError, which says how to go on.

    Parameters
    ----------
    run_directory : where what is finished is kept.
    """
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise RunError(
            f"{reason}. What is finished is kept in {run_directory}: the same command continues "
            "from there"
        ) from error


def _reason(error: Exception) -> str | None:
    """What happened and what to do, or None if it is not of this kind."""
    if isinstance(error, OSError):
        return disk_obstacle(error)
    import torch  # here, since the command line imports this module to tell of a disk

    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if memory or "can't allocate memory" in str(error):
        told = str(error).splitlines()[0] if str(error) else "out of memory"
        return f"{told}: too little memory; fewer or shorter sequences need less"
    return None
