"""What calibration data is, for telling whether it has changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mcsharp_sdk.data.calibration import Calibration, DatasetSource, ImageTextSource, TextSource
from mcsharp_sdk.data.image_text import read_pairs
from mcsharp_sdk.embedded.text import calibration_text
from mcsharp_sdk.errors import InputError


def data_fingerprint(settings: Calibration) -> dict[str, str]:
    """What the calibration text is, for telling whether a run may be resumed.

    Returns
    -------
    Name of a part -> sha256 of a file's, a local dataset's or the embedded text's bytes; a
    dataset on the hub is known by its name alone.

    Raises
    ------
    InputError
        If a file cannot be read.
    """
    if isinstance(settings, ImageTextSource):
        images = [pair.image for pair in read_pairs(settings)]
        return {"calibration pairs": _hash_files([settings.path, *images])}
    if isinstance(settings, TextSource):
        return {"calibration file": _hash_files([settings.path])}
    if isinstance(settings, DatasetSource):
        identity = f"{settings.name}/{settings.config}/{settings.split}/{settings.field}"
        files = _local_files(Path(settings.name))
        contents = {"calibration dataset files": _hash_files(files)} if files else {}
        return {"calibration dataset": identity} | contents
    return {"calibration text": hashlib.sha256(calibration_text().encode()).hexdigest()}


def _local_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []


def _hash_files(paths: list[Path]) -> str:
    """sha256 over the files' names and contents, read piece by piece."""
    total = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    return total.hexdigest()
