"""Verbs of the command line, run in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcsharp_sdk.cli import main


def run(*arguments: str | Path) -> int:
    """The exit code of ``mcsharp`` with these arguments."""
    with pytest.raises(SystemExit) as end:
        main.run([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return end.value.code
