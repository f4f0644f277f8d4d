"""A lock on a file, by which runs keep out of each other's folders."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from mcsharp_sdk.errors import InputError


class InUse(InputError):
    """Another process, or another stream of this one, holds the lock."""


def lock(file: Path, subject: Path | None = None) -> IO[str]:
    """Lock a file, made if need be, until the stream that is returned is closed.

    Parameters
    ----------
    subject : what the lock is for, in messages; by default the file's folder.

    Raises
    ------
    InUse
        If another process, or another stream of this one, holds it.
    """
    subject = subject or file.parent
    stream = file.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = file.exists() and os.path.samestat(file.stat(), os.fstat(stream.fileno()))
    except OSError as error:
        stream.close()
        raise InUse(
            f"{subject} is in use by another run: wait until it ends, or give another folder"
        ) from error
    if not held:  # the run that held it has just removed it
        stream.close()
        raise InUse(f"{subject} was in use by another run: try again")
    return stream
