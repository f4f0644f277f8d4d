"""Where the package's log goes: not to the terminal, and to a file if one is asked for."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from mcsharp_sdk.cli.output import print_note
from mcsharp_sdk.errors import InputError

logger = logging.getLogger("mcsharp_sdk")

FORMAT = "%(asctime)s %(levelname)s %(message)s"
_FIRST_LINE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ")
"""How a file begins that was written in this format."""


def keep_off_the_terminal() -> None:
    """Let only what a verb prints name warnings on the terminal, once, at its end."""
    logger.propagate = False
    logger.addHandler(logging.NullHandler())


def log_to(file: Path, model: Path, recipe: str, output: Path, run_dir: Path) -> None:
    """Send the package's log to a file, behind the logs of earlier runs that are in it.

    Parameters
    ----------
    model, recipe, output, run_dir : of the run; the file is none of theirs.

    Raises
    ------
    InputError
        If the file is something else than a log, or cannot be written.
    """
    try:
        folders = {"model": model, "output": output, "run directory": run_dir}
        _check(file, folders, Path(recipe))
        handler = _LogFile(file, encoding="utf-8")
    except OSError as error:
        why = error.strerror or error
        raise InputError(
            f"{file}: no log can be written: {why}; give another --log-file"
        ) from error
    handler.setFormatter(logging.Formatter(FORMAT))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _check(file: Path, folders: dict[str, Path], recipe: Path) -> None:
    """InputError if a log would be written into what is not a log."""
    for what, folder in folders.items():
        if file.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{file} lies in the {what} {folder}: give another --log-file")
    if file.exists() and recipe.is_file() and file.samefile(recipe):
        raise InputError(f"{file} is the recipe: give another --log-file")
    if file.is_file() and not _is_log(file):
        raise InputError(
            f"{file} is there already and is no log of mcsharp: give another --log-file"
        )


def _is_log(file: Path) -> bool:
    """Whether a file is empty, or begins as our logs do."""
    with file.open("rb") as stream:
        start = stream.read(64)
    return not start or _FIRST_LINE.match(start) is not None


class _LogFile(logging.FileHandler):
    """A log whose disk may be full: that is said once, and the run goes on."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Warn of what a record could not be written for; called by ``logging``."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            print_note(
                f"warning: {self.baseFilename}: the log is not complete: {error.strerror}; "
                "the run goes on"
            )
