"""Names of the files in a model's folder, and what a path is that should be one.

Both are here for all to know before anything heavy is imported.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mcsharp_sdk.errors import InputError

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
RECIPE_FILE = "recipe.yaml"
REPORT_FILE = "mcsharp_report.json"
PAGE_FILE = "mcsharp_report.html"
EVALUATION_FILE = "mcsharp_evaluation.json"
MANIFEST_FILE = "manifest.json"
"""Of a model, or of routers, exported as ONNX."""

SWEEP_FILE = "sweep.json"

NOT_GGUF = "which is not read: give the model that it was made of, in safetensors"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""``owner/name``, as hubs call their models."""


def run_folder_of(output: Path) -> Path:
    """Where a run keeps what is finished until its output is there, if it is told no other place.

    It is a hidden folder beside the output, which has a name.
    """
    return output.with_name(f".{output.name}.run")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder and the folders in it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_model_folder(path: Path) -> None:
    """Check that a path is a folder with a ``config.json``.

    Raises
    ------
    InputError
        If it is not; the message says what it is instead, and what to do.
    """
    if (path / CONFIG_FILE).is_file():
        return
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        raise InputError(f"{path} is GGUF, {NOT_GGUF}")
    if path.is_file():
        raise InputError(f"{path} is a file: give the folder of the model")
    if not path.is_dir():
        raise InputError(_absent(path))
    if (path / SWEEP_FILE).is_file():
        raise InputError(
            f"{path} is a sweep, no model: `mcsharp report --compare {path} --output FILE` draws "
            "it; models that it kept are in its folder variants"
        )
    raise InputError(f"{path} is not a model folder: it has no {CONFIG_FILE}")


def check_folder_to_make(path: Path) -> None:
    """InputError if no folder can be made at a path; one may be there."""
    if path.is_file():
        raise InputError(f"{path} is a file: give a folder to make")
    if os.path.lexists(path) and not path.is_dir():  # a device, or a link that leads nowhere
        raise InputError(f"{path} is there and is no folder: give another one to make")
    _check_writable(path)


def check_file_to_write(path: Path) -> None:
    """InputError if no file can be written at a path; one may be there."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the file to write")
    if path.is_symlink():
        raise InputError(f"{path} is a link: give the file that it leads to")
    if path.exists() and not path.is_file():  # a device or a pipe would be replaced by a file
        raise InputError(f"{path} is there and is no file: give another one to write")
    _check_writable(path)


def _check_writable(path: Path) -> None:
    """InputError if the folders above a path are not there and cannot be made."""
    above = next(p for p in path.absolute().parents if os.path.lexists(p))
    if not above.is_dir():
        raise InputError(f"{path} cannot be made: {above} is no folder; give another path")
    if not os.access(above, os.W_OK):
        raise InputError(f"{path} cannot be made: {above} is not writable; give another path")


def _absent(path: Path) -> str:
    if path.parts[:1] == ("~",):
        return f"there is no folder {path}; ~ is not expanded here: write the path in full"
    run = run_folder_of(path) if path.name else path
    if run.is_dir():
        return (
            f"{path} does not exist: its run is unfinished ({run}); the same compress command "
            "continues it"
        )
    if _HUB_NAME.fullmatch(str(path)) and not path.parent.exists():
        return (
            f"there is no folder {path}; if it is a name on a hub: models are not fetched, so "
            "download it first and give the folder"
        )
    return f"there is no folder {path}"
