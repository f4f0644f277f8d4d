"""Manifests of exported folders, read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from mcsharp_sdk.errors import InputError, InputProblems, Problem

MANIFEST = "manifest.json"

AnyManifest = TypeVar("AnyManifest", bound=BaseModel)


def read_manifest_of(kind: type[AnyManifest], folder: Path, what: str) -> AnyManifest:
    """Read and check ``manifest.json``; the files that it names are not opened.

    Parameters
    ----------
    kind : of the manifest.
    folder : where it lies.
    what : the folder should hold, for the error.

    Raises
    ------
    InputError
        If it is missing, not JSON, of another version, or names files outside of the folder.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not the manifest of {what}: {error}") from error
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problems = [Problem(".".join(map(str, f["loc"])), f["msg"]) for f in error.errors()]
        raise InputProblems(str(path), problems) from error
