"""Manifests of exported folders, read and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from mcsharp_sdk.errors import InputError, InputProblems, Problem
from mcsharp_sdk.folders import MANIFEST_FILE

OPENED_BY = {
    "mcsharp.onnx_model": "OnnxModel of mcsharp_exporters.onnx_model_runner",
    "mcsharp.onnx_routers": "OnnxRouters of mcsharp_exporters.onnx_runner",
}
"""Format of a folder -> what opens it."""

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
        If it is missing, not JSON, of another format or version, or names files outside of the
        folder.
    """
    path = folder / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not the manifest of {what}: {error}") from error
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        said = format_of(folder)
        if said in OPENED_BY and said != kind.model_fields["format"].default:
            raise InputError(f"{folder} is not {what}: open it with {OPENED_BY[said]}") from None
        problems = [Problem(".".join(map(str, f["loc"])), f["msg"]) for f in error.errors()]
        raise InputProblems(str(path), problems) from error


def format_of(folder: Path) -> str:
    """The format that a folder's manifest says it is of; empty if it says none."""
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    return str(content.get("format", "")) if isinstance(content, dict) else ""
