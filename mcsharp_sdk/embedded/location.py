"""Where the embedded model lies."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from mcsharp_sdk.errors import RunError
from mcsharp_sdk.folders import CONFIG_FILE


def model_directory() -> Path:
    """Directory of the embedded model: weights, config, tokenizer and card.

    Raises
    ------
    RunError
        If the package was installed without it, or lies inside an archive.
    """
    directory = files("mcsharp_sdk.embedded") / "pydoc-moe"
    if not isinstance(directory, Path) or not (directory / CONFIG_FILE).is_file():
        raise RunError(
            "the embedded model is not there: install mcsharp_sdk from its wheel or repository, "
            "unpacked"
        )
    return directory
